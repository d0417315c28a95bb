// SPDX-License-Identifier: Apache-2.0

// Package testbed runs a service proxy on node1 of a lab. The proxy follows a real
// kube-apiserver, which package cluster builds and starts, or a directory of manifests.
// Several labs can share one of these: their nodes have the same names and addresses.
package testbed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
)

// stopTimeout is how long a proxy may take to end by itself.
const stopTimeout = 30 * time.Second

// routerAddr is where the nodes of a lab reach the API server.
var routerAddr = netlab.NodeNetwork.V4.Addr().Next()

// ClusterOptions make a dual-stack cluster whose cluster IPs the lab's router sends to
// node1, and whose API server is behind that router.
func ClusterOptions() cluster.Options {
	return cluster.Options{
		ServiceCIDRs: []netip.Prefix{netlab.ServiceNetwork.V4, netlab.ServiceNetwork.V6},
		Advertise:    routerAddr,
	}
}

// StartCluster builds what a control plane needs, unless an earlier run has built it, and
// starts it in dir. audited is for Cluster.Requests.
func StartCluster(ctx context.Context, dir string, audited bool, log func(format string, args ...any)) (*cluster.Cluster, error) {
	programs, err := cluster.Build(ctx, log)
	if err != nil {
		return nil, err
	}
	return StartPrograms(ctx, programs, dir, audited, log)
}

// StartPrograms starts a control plane in dir. audited is for Cluster.Requests.
func StartPrograms(ctx context.Context, programs cluster.Binaries, dir string, audited bool, log func(format string, args ...any)) (*cluster.Cluster, error) {
	log("starting etcd and the API server")
	options := ClusterOptions()
	options.Dir, options.Unaudited = dir, !audited
	c, err := cluster.Start(ctx, programs, options)
	if err != nil {
		return nil, fmt.Errorf("start the control plane: %w", err)
	}
	return c, nil
}

// ZoneOf is the zone of a node: zone-1 for node1.
func ZoneOf(node string) string { return "zone-" + strings.TrimPrefix(node, "node") }

// Node is the Node of a host, as a kubelet and the controller that assigns Pod ranges
// write it.
func Node(host *netlab.Host) *corev1.Node {
	name, pods := host.Name, netlab.NodePodNetwork(host.Name)
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name, corev1.LabelTopologyZone: ZoneOf(name)}},
		Spec:       corev1.NodeSpec{PodCIDR: pods.V4.String(), PodCIDRs: []string{pods.V4.String(), pods.V6.String()}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: host.Addr.V4.String()}, {Type: corev1.NodeInternalIP, Address: host.Addr.V6.String()},
		}},
	}
}

// CreateNodes creates the Nodes of a lab in the API.
func CreateNodes(ctx context.Context, c *cluster.Cluster, lab *netlab.Lab, names ...string) error {
	for _, name := range names {
		if _, err := c.Admin().CoreV1().Nodes().Create(ctx, Node(lab.Host(name)), metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// Bed is a lab with a way to the API server, or with a directory of manifests.
type Bed struct {
	Lab *netlab.Lab
	// Relay carries the node's connections to the API server. It is nil with a directory.
	Relay *cluster.Relay
	// APIServer is where the node reaches it, as HOST:PORT, and Kubeconfig the file for it.
	APIServer, Kubeconfig string
	source, dir           string
}

// NewFromDirectory builds a lab for a directory of manifests. Logs go to dir.
func NewFromDirectory(d *Directory, opts netlab.Options, dir string) (*Bed, error) {
	lab, err := netlab.New(opts)
	if err != nil {
		return nil, err
	}
	return &Bed{Lab: lab, source: d.Path, dir: dir}, nil
}

// New builds a lab for a control plane. Logs and configuration files go to dir.
func New(c *cluster.Cluster, opts netlab.Options, dir string) (*Bed, error) {
	lab, err := netlab.New(opts)
	if err != nil {
		return nil, err
	}
	b := &Bed{
		Lab: lab, dir: dir, Kubeconfig: filepath.Join(dir, "kubeconfig"),
		APIServer: netip.AddrPortFrom(routerAddr, uint16(c.Port())).String(),
	}
	if err := c.WriteKubeconfig(b.Kubeconfig, b.APIServer, cluster.ProxyUser); err != nil {
		return nil, errors.Join(err, lab.Close())
	}
	b.Relay, err = cluster.NewRelay(c.Addr(), func() (net.Listener, error) {
		return lab.Host("router").Listen("tcp", b.APIServer)
	})
	if err != nil {
		return nil, errors.Join(err, lab.Close())
	}
	return b, nil
}

// Close takes the lab apart.
func (b *Bed) Close() error {
	if b.Relay != nil {
		b.Relay.Cut()
	}
	return b.Lab.Close()
}

// Received is how many bytes came from the API server, encrypted as they were; 0 with a
// directory.
func (b *Bed) Received() int64 {
	if b.Relay == nil {
		return 0
	}
	return b.Relay.Answered()
}

// Start runs a proxy on node1. Its output goes to LogPath.
func (b *Bed) Start(p Proxy) (*cluster.Process, error) {
	args := p.Args(b.Kubeconfig, b.source)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = b.Env()
	if p.Tools != "" {
		dir, err := ToolsDir(b.dir, p.Tools)
		if err != nil {
			return nil, err
		}
		cmd.Env = append(cmd.Env, "PATH="+dir+":"+os.Getenv("PATH"))
	}
	return cluster.StartProcess(cmd, b.LogPath(p), b.Lab.Host("node1").Do)
}

// Env is the environment for programs that run the iptables tools. Their lock is for one
// network namespace: the lab has its own.
func (b *Bed) Env() []string {
	return append(os.Environ(), "XTABLES_LOCKFILE="+filepath.Join(b.dir, "xtables.lock"))
}

// LogPath is the file with the output of a proxy.
func (b *Bed) LogPath(p Proxy) string { return filepath.Join(b.dir, p.Name()+".log") }

// Stop ends a proxy with SIGTERM. How it ends is its own matter: kube-proxy does not
// handle the signal.
func Stop(p *cluster.Process) error {
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.Done():
		return nil
	case <-time.After(stopTimeout):
		p.Kill()
		return fmt.Errorf("the proxy did not end within %v of SIGTERM", stopTimeout)
	}
}

// ToolsDir makes a directory in which the plain names of the iptables tools are those of
// a variant, nft or legacy.
func ToolsDir(parent, variant string) (string, error) {
	dir := filepath.Join(parent, "tools-"+variant)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, tool := range []string{"", "-save", "-restore"} {
			path, err := exec.LookPath(family + "-" + variant + tool)
			if err != nil {
				return "", err
			}
			err = os.Symlink(path, filepath.Join(dir, family+tool))
			if err != nil && !errors.Is(err, os.ErrExist) {
				return "", err
			}
		}
	}
	return dir, nil
}
