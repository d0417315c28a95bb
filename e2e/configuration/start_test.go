// SPDX-License-Identifier: Apache-2.0

package configuration

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/procfs"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/kube-proxy/config/v1alpha1"
	"sigs.k8s.io/yaml"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
)

// input is what both programs are given, and what must come of it.
type input struct {
	args string // flags, separated by blanks; KUBECONFIG is a file that is there
	file string // below the file's kind; the word "none" for no file

	refused bool // by both
	// accepted is by signalbox alone, on purpose. docs/configuration.md has why.
	accepted bool
	// otherwise are lines of /configz that signalbox has in the place of
	// kube-proxy's, on purpose.
	otherwise map[string]string
	// mode is signalbox's, and listens where it listens, where these are not
	// kube-proxy's, on purpose.
	mode, listens string
	// noMetrics says that signalbox has no server of metrics, on purpose.
	noMetrics bool
	// runner starts signalbox by /go-runner, as kube-proxy's images do.
	runner bool
}

const none = "none"

// hangTimeout ends a test that hangs and decides nothing else.
const hangTimeout = 5 * time.Minute

// apiPort is the API server's, on the loopback interface of each proxy's own
// network namespace.
const apiPort = 6443

// withoutIPVS is what kube-proxy says where the kernel lacks IPVS.
const withoutIPVS = "can't use the IPVS proxier"

func TestStarted(t *testing.T) {
	kubeProxy, signalbox := build(t)
	for _, in := range slices.Concat(inputs, distributions) {
		t.Run(in.name(), func(t *testing.T) {
			t.Parallel()
			args := in.prepare(t, t.TempDir())
			theirs, ours := start(t, append([]string{kubeProxy}, args...)), start(t, append(in.command(t, signalbox), args...))
			theirs.settle()
			ours.settle()
			if strings.Contains(theirs.refusal, withoutIPVS) {
				// It took the configuration. Only what it writes can be compared, for
				// which it completes no address.
				in.args = strings.Replace(in.args, "--metrics-bind-address=127.0.0.1 ", "--metrics-bind-address=127.0.0.1:10249 ", 1)
				in.compareWritten(t, kubeProxy, signalbox)
				return
			}
			if (theirs.refusal != "") != (in.refused || in.accepted) || (ours.refusal != "") != in.refused {
				t.Fatalf("refused should be %v: kube-proxy: %s; signalbox: %s", in.refused, theirs.refusal, ours.refusal)
			}
			if theirs.refusal == "" {
				in.compare(t, theirs, ours)
			}
		})
	}
}

// command is what signalbox is started by.
func (in *input) command(t *testing.T, signalbox string) []string {
	t.Helper()
	if !in.runner {
		return []string{signalbox}
	}
	dir := t.TempDir()
	runner, kubeProxy := filepath.Join(dir, "go-runner"), filepath.Join(dir, "kube-proxy")
	if err := errors.Join(os.Symlink(signalbox, runner), os.Symlink(signalbox, kubeProxy)); err != nil {
		t.Fatal(err)
	}
	return []string{runner, "--log-file=" + filepath.Join(dir, "log"), "--also-stdout", kubeProxy}
}

// build returns the paths of kube-proxy and signalbox.
func build(t *testing.T) (kubeProxy, signalbox string) {
	t.Helper()
	binaries, err := cluster.Build(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	signalbox, err = cluster.BuildSignalbox(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return binaries.KubeProxy, signalbox
}

func (in *input) name() string {
	return strings.ReplaceAll(strings.TrimSpace(in.args+" "+in.file), "\n", ";")
}

// prepare writes the files and returns the flags. Settings of connection tracking
// are the whole machine's, so that they are left alone where an input is not about
// them.
func (in *input) prepare(t *testing.T, dir string) []string {
	t.Helper()
	kubeconfig := filepath.Join(dir, "kubeconfig")
	write(t, kubeconfig, "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c}}], clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]}")
	args := append([]string{fmt.Sprintf("--master=http://127.0.0.1:%d", apiPort)}, strings.Fields(strings.ReplaceAll(in.args, "KUBECONFIG", kubeconfig))...)
	if in.file == none {
		return append([]string{"--conntrack-max-per-core=0"}, args...)
	}
	text := in.head() + strings.ReplaceAll(in.file, "KUBECONFIG", strconv.Quote(kubeconfig)) + "\n"
	if !strings.Contains(text, "conntrack:") {
		text += "conntrack: {maxPerCore: 0}\n"
	}
	file := filepath.Join(dir, "in.yaml")
	write(t, file, text)
	return append(args, "--config="+file)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// head are the lines that every file begins with, unless it has its own.
func (in *input) head() string {
	var head string
	for _, line := range []string{"apiVersion: kubeproxy.config.k8s.io/v1alpha1\n", "kind: KubeProxyConfiguration\n"} {
		if key, _, _ := strings.Cut(line, " "); !strings.HasPrefix(in.file, key) {
			head += line
		}
	}
	return head
}

// proxy is a program in a network namespace that holds nothing else but its API
// server.
type proxy struct {
	*testing.T
	host    *netlab.Host
	process *cluster.Process
	api     *apiServer
	// refusal is what it said last if it ended, which it does for its
	// configuration.
	refusal string
}

func start(t *testing.T, command []string) *proxy {
	t.Helper()
	lab, err := netlab.Lone("node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lab.Close() })
	p := &proxy{T: t, host: lab.Host("node"), api: &apiServer{t: t, started: make(chan struct{})}}
	listener, err := p.host.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", apiPort))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: p.api}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	p.process, err = cluster.StartProcess(exec.Command(command[0], command[1:]...), filepath.Join(t.TempDir(), "log"), p.host.Do)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.process.Stop(hangTimeout) })
	return p
}

// settle waits until the program serves or has ended.
func (p *proxy) settle() {
	p.Helper()
	select {
	case <-p.api.started:
	case <-p.process.Done():
		p.refusal = p.process.Tail(5)
		if p.process.Err() == nil {
			p.Errorf("it ended with code 0: %s", p.refusal)
		}
	case <-time.After(hangTimeout):
		p.Fatalf("it neither serves nor ends:\n%s", p.process.Log())
	}
}

// compare wants signalbox to do what kube-proxy does. Ports are opened beside the
// Event that says that a proxy serves.
func (in *input) compare(t *testing.T, theirs, ours *proxy) {
	t.Helper()
	var want, got deeds
	err := wait.PollUntilContextTimeout(t.Context(), 100*time.Millisecond, hangTimeout/10, true, func(context.Context) (bool, error) {
		want, got = theirs.does(), ours.does()
		if want.configz == "" {
			return false, nil // its ports are not open yet
		}
		want.listens, want.mode = cmp.Or(in.listens, want.listens), cmp.Or(in.mode, want.mode)
		if in.noMetrics {
			want.configz, want.mode = "", ""
		}
		var err error
		want.configz, err = in.replaceLines(want.configz)
		return want == got, err
	})
	if err != nil {
		diff := gocmp.Diff(want, got, gocmp.AllowUnexported(deeds{}))
		t.Errorf("signalbox does not do what kube-proxy does (%v; -want +got):\n%s\nkube-proxy's log:\n%s\nsignalbox's log:\n%s", err, diff, theirs.process.Tail(10), ours.process.Tail(10))
	}
}

// deeds are what a proxy that serves does.
type deeds struct {
	listens, mode, configz string
	// modeUnset says that it warns of a mode that nobody configured: signalbox by
	// an Event, kube-proxy only in its log, as it makes the Event before it sends any.
	modeUnset bool
}

func (p *proxy) does() (d deeds) {
	p.Helper()
	d.listens = p.listens()
	d.modeUnset = p.api.modeUnset.Load() || strings.Contains(p.process.Log(), "No kube-proxy mode specified")
	for _, at := range strings.Fields(d.listens) {
		// An unspecified address stands for two, which the dialer tries outside the
		// network namespace.
		at = strings.NewReplacer("0.0.0.0", "127.0.0.1", "[::]", "[::1]").Replace(at)
		configz, err := p.get("http://" + at + "/configz")
		if err != nil {
			continue // not the server of metrics
		}
		var errMode error
		d.configz, err = inYAML(configz)
		d.mode, errMode = p.get("http://" + at + "/proxyMode")
		if err := errors.Join(err, errMode); err != nil {
			p.Error(err)
		}
	}
	return d
}

// listens are the addresses at which the program listens for TCP connections.
func (p *proxy) listens() string {
	p.Helper()
	fs, err := procfs.NewFS(fmt.Sprintf("/proc/%d", p.process.Pid()))
	if err != nil {
		p.Fatal(err)
	}
	v4, err4 := fs.NetTCP()  //nolint:staticcheck // the netlink way needs a kernel with inet_diag
	v6, err6 := fs.NetTCP6() //nolint:staticcheck
	if err := errors.Join(err4, err6); err != nil {
		p.Fatal(err)
	}
	var at []string
	const listening = 0x0a
	for _, socket := range slices.Concat(v4, v6) {
		if socket.St == listening && socket.LocalPort != apiPort {
			at = append(at, net.JoinHostPort(socket.LocalAddr.String(), strconv.FormatUint(socket.LocalPort, 10)))
		}
	}
	slices.Sort(at)
	return strings.Join(at, " ")
}

func (p *proxy) get(url string) (string, error) {
	client := p.host.Client()
	defer client.CloseIdleConnections()
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, resp.Status)
	}
	return string(body), err
}

// inYAML is what /configz says as a configuration file.
func inYAML(configz string) (string, error) {
	var byGroup map[string]json.RawMessage
	if err := json.Unmarshal([]byte(configz), &byGroup); err != nil {
		return "", err
	}
	text, err := yaml.JSONToYAML(byGroup[v1alpha1.GroupName])
	return string(text), err
}

// replaceLines puts signalbox's lines in the place of kube-proxy's.
func (in *input) replaceLines(text string) (string, error) {
	for line, instead := range in.otherwise {
		i := strings.LastIndex("\n"+text, "\n"+line+"\n")
		if i < 0 {
			return "", fmt.Errorf("kube-proxy does not have %q:\n%s", line, text)
		}
		text = text[:i] + instead + text[i+len(line):]
	}
	return text, nil
}
