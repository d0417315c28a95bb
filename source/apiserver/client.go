// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"
	"k8s.io/klog/v2"

	"signalbox/internal/readfile"
)

// ClientOptions say where the API server is, and how to talk to it.
type ClientOptions struct {
	// Kubeconfig is a file; Master is an address, which wins over the file's.
	// Both empty means the service account of this process's Pod.
	Kubeconfig, Master string
	// QPS and Burst bound the requests per second; 0 means client-go's defaults.
	QPS   float32
	Burst int
	// ContentType is for requests; empty means protobuf. AcceptContentTypes is for
	// answers, in order of preference; empty means ContentType, then JSON.
	ContentType, AcceptContentTypes string
	// Servers learns the addresses to which the client connects; may be nil.
	Servers *Servers
}

// protobuf is several times cheaper to decode than JSON.
const protobuf = "application/vnd.kubernetes.protobuf"

// Client returns a client for the API server. It does not connect yet.
func Client(opts ClientOptions) (kubernetes.Interface, error) {
	cfg, err := restConfig(opts)
	if err != nil {
		return nil, err
	}
	cfg.QPS, cfg.Burst = opts.QPS, opts.Burst
	cfg.ContentType = cmp.Or(opts.ContentType, protobuf)
	cfg.AcceptContentTypes = cmp.Or(opts.AcceptContentTypes, cfg.ContentType+",application/json")
	cfg.UserAgent = rest.DefaultKubernetesUserAgent()
	if opts.Servers != nil {
		cfg.Dial = opts.Servers.dial
	}
	if file := cfg.BearerTokenFile; file != "" {
		// By itself, client-go reads the file within a minute. Here, a refused token is read again at once.
		cfg.Wrap(transport.ResettableTokenSourceWrapTransport(transport.NewCachedFileTokenSource(file)))
		cfg.BearerToken, cfg.BearerTokenFile = "", ""
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("the API server at %q, of %s: %w; an address is such as https://10.0.0.1:6443, and certificates are in PEM", cfg.Host, opts.origin(), err)
	}
	return client, nil
}

func restConfig(opts ClientOptions) (*rest.Config, error) {
	if opts.Kubeconfig == "" && opts.Master == "" {
		cfg, err := rest.InClusterConfig()
		switch {
		case errors.Is(err, rest.ErrNotInCluster):
			return nil, fmt.Errorf("no --kubeconfig, --master or --source is given, and this is not a Pod with a service account: give one of them (%w)", err)
		case err != nil:
			return nil, fmt.Errorf("reading the Pod's service account: %w; have it mounted (automountServiceAccountToken), or give --kubeconfig", err)
		}
		return cfg, nil
	}
	if err := readable(opts.Kubeconfig); err != nil {
		return nil, fmt.Errorf("%s: %w", opts.origin(), err)
	}
	rules := &clientcmd.ClientConfigLoadingRules{ExplicitPath: opts.Kubeconfig}
	overrides := &clientcmd.ConfigOverrides{}
	overrides.ClusterInfo.Server = opts.Master
	cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides).ClientConfig()
	switch {
	case clientcmd.IsEmptyConfig(err):
		return nil, fmt.Errorf("%s names no API server: a kubeconfig has clusters, users, contexts and a current-context; --master can name the server alone", opts.origin())
	case err != nil:
		return nil, fmt.Errorf("%s: %w; `kubectl config view` shows what a kubeconfig says", opts.origin(), err)
	}
	return cfg, nil
}

// readable returns why a kubeconfig cannot be read, or nil. The library reads the
// file again; its own error would have the file's name twice.
func readable(kubeconfig string) error {
	if kubeconfig == "" {
		return nil
	}
	_, err := clientcmd.LoadFromFile(kubeconfig)
	var path *fs.PathError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &path):
		return readfile.Why(err)
	}
	return fmt.Errorf("not a kubeconfig: %w; give one such as `kubectl config view --raw` prints", err)
}

// origin names the setting with the API server's address.
func (o *ClientOptions) origin() string {
	master := fmt.Sprintf("--master=%s", o.Master)
	kubeconfig := fmt.Sprintf("--kubeconfig=%s (clientConnection.kubeconfig in a file)", o.Kubeconfig)
	switch {
	case o.Kubeconfig == "" && o.Master == "":
		return "the Pod's service account"
	case o.Master == "":
		return kubeconfig
	case o.Kubeconfig == "":
		return master
	}
	return master + " and " + kubeconfig
}

// requestTimeout bounds Ask and Version.
const requestTimeout = 10 * time.Second

// Ask returns nil if the API server lists Services, or else the reason. It asks
// for one that is in the server's cache.
func Ask(ctx context.Context, client kubernetes.Interface) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err := client.CoreV1().Services(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, "kubernetes").String(), ResourceVersion: "0",
	})
	if err != nil {
		return fmt.Errorf("asking the API server for Services: %s: %w", explain("services", err), err)
	}
	return nil
}

// Version returns the API server's release, such as v1.36.3.
func Version(ctx context.Context, client kubernetes.Interface) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	info, err := discovery.ToServerVersionInterfaceWithContext(client.Discovery()).ServerVersionWithContext(ctx)
	if err != nil {
		return "", fmt.Errorf("asking the API server for its version: %w", err)
	}
	return info.GitVersion, nil
}

// LogTo sends the log of the Kubernetes client libraries to log, for the whole
// process. By default, they write to standard error in their own format.
func LogTo(log *slog.Logger) { klog.SetSlogLogger(log.With("from", "client-go")) }
