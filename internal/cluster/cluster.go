// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// ProxyUser is the user that Kubernetes itself binds to the ClusterRole
// system:node-proxier: what a service proxy may do, and no more.
const ProxyUser = "system:kube-proxy"

// hangTimeout ends what hangs. It is longer than a slow machine needs: an API server was
// not ready after 5 minutes on an emulated processor.
const hangTimeout = 15 * time.Minute

// Options say how a cluster is made.
type Options struct {
	// Dir holds the cluster's data, certificates and logs.
	Dir string
	// ServiceCIDRs are --service-cluster-ip-range: one, or one per family.
	ServiceCIDRs []netip.Prefix
	// Advertise is the address that the Service default/kubernetes points to.
	Advertise netip.Addr
	// Uncached are resources, as in "services" or
	// "endpointslices.discovery.k8s.io", whose watches the API server serves
	// from etcd and not from its own cache, so that they expire with etcd's
	// history.
	Uncached []string
	// Unaudited switches off the log of requests, which slows down each of them; see
	// Requests.
	Unaudited bool
}

// Cluster is a control plane at work.
type Cluster struct {
	opts      Options
	bin       Binaries
	ca        *authority
	etcdPort  int
	apiPort   int
	claims    []net.Listener // see freePort
	etcd      *Process
	apiserver *Process
	admin     *kubernetes.Clientset
}

// Start starts etcd and the API server and returns when the API server is
// ready and gives out cluster IPs.
func Start(ctx context.Context, bin Binaries, opts Options) (*Cluster, error) {
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	if err := ca.writeServerFiles(opts.Dir); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(opts.Dir, "audit.yaml"), []byte(auditPolicy), 0o600); err != nil {
		return nil, err
	}
	c := &Cluster{opts: opts, bin: bin, ca: ca}
	if c.admin, err = c.pickPorts(); err != nil {
		return nil, err
	}
	if err := c.startEtcd(ctx); err != nil {
		return nil, err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

// pickPorts also makes the client, which needs to know them.
func (c *Cluster) pickPorts() (*kubernetes.Clientset, error) {
	var err error
	if c.etcdPort, err = c.freePort(); err != nil {
		return nil, err
	}
	if c.apiPort, err = c.freePort(); err != nil {
		return nil, err
	}
	config, err := c.Config("admin", "system:masters")
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

// freePort finds a port below those that the kernel gives to clients, so that
// no connection of the machine takes it while the API server restarts. A socket
// with the port in its name keeps it from other clusters of the machine, which
// look for ports at the same time.
func (c *Cluster) freePort() (int, error) {
	for range 100 {
		port := 20000 + rand.IntN(10000)
		claim, err := net.Listen("unix", fmt.Sprintf("@signalbox-e2e-port-%d", port))
		if err != nil {
			continue
		}
		c.claims = append(c.claims, claim)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("no free port between 20000 and 30000")
}

func (c *Cluster) etcdURL() string { return fmt.Sprintf("http://127.0.0.1:%d", c.etcdPort) }

func (c *Cluster) startEtcd(ctx context.Context) error {
	peers, err := c.freePort()
	if err != nil {
		return err
	}
	peerURL := fmt.Sprintf("http://127.0.0.1:%d", peers)
	cmd := exec.Command(c.bin.Etcd,
		"--name=e2e", "--data-dir="+filepath.Join(c.opts.Dir, "etcd"),
		"--listen-client-urls="+c.etcdURL(), "--advertise-client-urls="+c.etcdURL(),
		"--listen-peer-urls="+peerURL, "--initial-advertise-peer-urls="+peerURL, "--initial-cluster=e2e="+peerURL,
		"--unsafe-no-fsync", // nothing here survives a power cut anyway
		"--log-level=warn")
	if c.etcd, err = StartProcess(cmd, filepath.Join(c.opts.Dir, "etcd.log"), nil); err != nil {
		return err
	}
	return c.etcd.waitUntil(ctx, func(ctx context.Context) error {
		return httpOK(ctx, http.DefaultClient, c.etcdURL()+"/health")
	})
}

// StartAPIServer starts the API server on the data that etcd holds and returns
// when it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	file := func(name string) string { return filepath.Join(c.opts.Dir, name) }
	var ranges, sizes []string
	for _, p := range c.opts.ServiceCIDRs {
		ranges = append(ranges, p.String())
	}
	for _, resource := range c.opts.Uncached {
		sizes = append(sizes, resource+"#0")
	}
	args := []string{
		"--etcd-servers=" + c.etcdURL(),
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", c.apiPort),
		"--advertise-address=" + c.opts.Advertise.String(),
		"--service-cluster-ip-range=" + strings.Join(ranges, ","),
		"--tls-cert-file=" + file("server.crt"), "--tls-private-key-file=" + file("server.key"), "--client-ca-file=" + file("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + file("sa.key"), "--service-account-signing-key-file=" + file("sa.key"),
		"--allow-privileged=true", // as everywhere that kubeadm has been
		"--authorization-mode=RBAC", "--anonymous-auth=false", "--profiling=false",
		"--etcd-compaction-interval=0", // history expires when a test says so
		"--shutdown-delay-duration=0s",
	}
	if !c.opts.Unaudited {
		args = append(args, "--audit-policy-file="+file("audit.yaml"), "--audit-log-path="+file("audit.log"), "--audit-log-mode=blocking")
	}
	if len(sizes) > 0 {
		args = append(args, "--watch-cache-sizes="+strings.Join(sizes, ","))
	}
	var err error
	if c.apiserver, err = StartProcess(exec.Command(c.bin.APIServer, args...), file("kube-apiserver.log"), nil); err != nil {
		return err
	}
	return c.apiserver.waitUntil(ctx, c.ready)
}

// ready says why the API server cannot be used yet. Being ready by its own
// account is not enough: it gives out no cluster IP before the ServiceCIDR of
// its own range exists, and its own Service comes last.
func (c *Cluster) ready(ctx context.Context) error {
	if err := c.admin.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error(); err != nil {
		return err
	}
	if _, err := c.admin.CoreV1().Namespaces().Get(ctx, metav1.NamespaceDefault, metav1.GetOptions{}); err != nil {
		return err
	}
	if _, err := c.admin.NetworkingV1().ServiceCIDRs().Get(ctx, "kubernetes", metav1.GetOptions{}); err != nil {
		return err
	}
	_, err := c.admin.CoreV1().Services(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{})
	return err
}

// StopAPIServer ends the API server; etcd and its data stay.
func (c *Cluster) StopAPIServer() error { return c.apiserver.Stop(hangTimeout) }

// APIServerPid is the API server's process id.
func (c *Cluster) APIServerPid() int { return c.apiserver.Pid() }

// Stop ends everything.
func (c *Cluster) Stop() error {
	var errs []error
	for _, p := range []*Process{c.apiserver, c.etcd} {
		if p == nil {
			continue
		}
		// etcd ends by the signal itself, which Wait calls an error.
		var exit *exec.ExitError
		if err := p.Stop(hangTimeout); err != nil && !errors.As(err, &exit) {
			errs = append(errs, err)
		}
	}
	for _, claim := range c.claims {
		errs = append(errs, claim.Close())
	}
	return errors.Join(errs...)
}

// Binaries are the programs that the cluster is made of, and the proxy of the
// same release.
func (c *Cluster) Binaries() Binaries { return c.bin }

// Admin is a client that may do everything. It outlives restarts of the API
// server.
func (c *Cluster) Admin() *kubernetes.Clientset { return c.admin }

// Addr is where the API server listens, on the host's loopback interface.
func (c *Cluster) Addr() string { return fmt.Sprintf("127.0.0.1:%d", c.apiPort) }

// Port is the API server's port, which the Service default/kubernetes sends
// connections to.
func (c *Cluster) Port() int { return c.apiPort }

// Config is how a user of some groups reaches the API server. Its requests are
// not limited in rate.
func (c *Cluster) Config(user string, groups ...string) (*rest.Config, error) {
	cert, key, err := c.ca.client(user, groups...)
	if err != nil {
		return nil, err
	}
	return &rest.Config{
		Host:            "https://" + c.Addr(),
		QPS:             -1,
		TLSClientConfig: rest.TLSClientConfig{ServerName: serverName, CAData: c.ca.pem, CertData: cert, KeyData: key},
	}, nil
}

// WriteKubeconfig writes the file with which a user reaches the API server at
// addr, which leads there through a Relay.
func (c *Cluster) WriteKubeconfig(path, addr, user string) error {
	cert, key, err := c.ca.client(user)
	if err != nil {
		return err
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["e2e"] = &clientcmdapi.Cluster{
		Server: "https://" + addr, TLSServerName: serverName, CertificateAuthorityData: c.ca.pem,
	}
	config.AuthInfos["proxy"] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	config.Contexts["e2e"] = &clientcmdapi.Context{Cluster: "e2e", AuthInfo: "proxy"}
	config.CurrentContext = "e2e"
	return clientcmd.WriteToFile(*config, path)
}

// Compact makes etcd forget everything that happened before the revision: a
// watch that asks for older changes is told that they expired. kube-apiserver's
// resource versions are etcd's revisions.
func (c *Cluster) Compact(ctx context.Context, revision string) error {
	return c.askEtcd(ctx, "compaction", map[string]any{"revision": revision, "physical": true}, nil)
}

// MaxPut is how many values one transaction of Put can have.
const MaxPut = 100

// Put writes values straight to etcd, in one transaction. It returns the revision, which
// is the resource version of the objects written. Keys are paths below /registry/.
func (c *Cluster) Put(ctx context.Context, values map[string][]byte) (revision string, err error) {
	type put struct {
		Key   []byte `json:"key"`
		Value []byte `json:"value"`
	}
	var puts []map[string]put
	for key, value := range values {
		puts = append(puts, map[string]put{"requestPut": {Key: []byte("/registry/" + key), Value: value}})
	}
	var answer struct {
		Header struct {
			Revision string `json:"revision"`
		} `json:"header"`
	}
	err = c.askEtcd(ctx, "txn", map[string]any{"success": puts}, &answer)
	return answer.Header.Revision, err
}

// askEtcd sends a request to etcd's JSON gateway.
func (c *Cluster) askEtcd(ctx context.Context, method string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.etcdURL()+"/v3/kv/"+method, bytes.NewReader(body))
	if err != nil {
		return err
	}
	text, err := do(http.DefaultClient, req)
	if err != nil || answer == nil {
		return err
	}
	return json.Unmarshal(text, answer)
}

func httpOK(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	_, err = do(client, req)
	return err
}

func do(client *http.Client, req *http.Request) (body []byte, err error) {
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", req.Method, req.URL, resp.Status, body)
	}
	return body, err
}

// waitUntil asks again and again whether the program is ready, until it is or
// has ended.
func (p *Process) waitUntil(ctx context.Context, ready func(context.Context) error) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, 50*time.Millisecond, hangTimeout, true, func(ctx context.Context) (bool, error) {
		select {
		case <-p.done:
			return false, errors.New("it ended")
		default:
		}
		last = ready(ctx)
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("%s is not ready: %w (%v); its log ends with\n%s", p.name, err, last, p.Tail(20))
	}
	return nil
}

// MakeDir makes a directory for a cluster's data on memory where there is
// some: etcd writes it all the time.
func MakeDir() (string, error) {
	if dir, err := os.MkdirTemp("/dev/shm", "signalbox-e2e-"); err == nil {
		return dir, nil
	}
	return os.MkdirTemp("", "signalbox-e2e-")
}
