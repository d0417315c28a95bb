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
	"k8s.io/klog/v2"

	"signalbox/internal/readfile"
)

// ClientOptions say where the API server is and how hard it may be asked.
type ClientOptions struct {
	// Kubeconfig is a file; Master is an address that wins over the file's.
	// Both empty means the service account of the Pod that this runs in.
	Kubeconfig, Master string
	// QPS and Burst bound the requests a second; client-go's defaults where 0.
	QPS   float32
	Burst int
	// ContentType is what is spoken; protobuf where empty. AcceptContentTypes
	// is what is asked for, in order; where empty, ContentType and then JSON.
	ContentType, AcceptContentTypes string
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

// readable returns what keeps a kubeconfig from being read, where there is one.
// The library, which reads it again, would name it a second time.
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

// origin is what says where the API server is.
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

// askFor bounds Ask.
const askFor = 10 * time.Second

// Ask returns nil if the API server tells of Services, or what keeps it from
// that. It is asked for one, which it has in its memory.
func Ask(ctx context.Context, client kubernetes.Interface) error {
	ctx, cancel := context.WithTimeout(ctx, askFor)
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
	ctx, cancel := context.WithTimeout(ctx, askFor)
	defer cancel()
	info, err := discovery.ToServerVersionInterfaceWithContext(client.Discovery()).ServerVersionWithContext(ctx)
	if err != nil {
		return "", fmt.Errorf("asking the API server for its version: %w", err)
	}
	return info.GitVersion, nil
}

// LogTo sends what the Kubernetes client libraries log, for the whole process,
// to log. They write to standard error in a form of their own otherwise.
func LogTo(log *slog.Logger) { klog.SetSlogLogger(log.With("from", "client-go")) }
