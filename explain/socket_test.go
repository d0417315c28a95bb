// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/utils/ptr"

	"signalbox/conntrack"
	"signalbox/internal/httpserve"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// served runs the world's Loop, and a Daemon that answers on a socket.
func (w *world) served(dir string) *Daemon {
	w.start()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.loop.Run(ctx) // it never fails
	}()
	d := NewDaemon("v1", time.Unix(0, 0))
	d.Follow(Subject{
		Environment: Environment{Node: "node1", Mode: "test", Origin: "test", Live: true}, Loop: w.loop, ModeReason: "a test", Flows: flows, Problems: func() []string { return slices.Clone(w.problems) },
	})
	var s Socket
	s.Open(dir, d.Handler(), slog.New(slog.DiscardHandler))
	w.t.Cleanup(func() {
		s.Close()
		cancel()
		<-done
	})
	return d
}

// flows are in the connection tracking table: one to the cluster IP, one to the NodePort
// with an endpoint that is gone, and one to the same port of another host.
func flows(family plan.Family, protocol plan.Protocol, fn func(conntrack.Flow)) error {
	if family != plan.IPv4 || protocol != plan.TCP {
		return errors.New("other flows are asked for")
	}
	at := netip.MustParseAddrPort
	fn(conntrack.Flow{Client: at("10.244.1.12:4000"), Frontend: at("10.96.0.10:80"), Endpoint: at("10.244.1.5:8080"), Source: at("10.244.1.12:4000")})
	fn(conntrack.Flow{Client: at("192.0.2.99:4001"), Frontend: at("192.0.2.1:30080"), Endpoint: at("10.244.1.99:8080"), Source: at("192.0.2.1:5000")})
	fn(conntrack.Flow{Client: at("10.244.1.12:4002"), Frontend: at("192.0.2.77:30080"), Endpoint: at("192.0.2.77:30080"), Source: at("10.244.1.12:4002")})
	return nil
}

func TestSocket(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "run")
	var answer Answer
	ask := func(target string) error {
		answer = Answer{}
		return Ask(t.Context(), dir, "/explain", url.Values{"target": {target}, "from": {pod}}, &answer)
	}
	if err := ask(clusterIP); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("without a daemon: %v", err)
	}
	d := w.served(dir)
	if err := ask(clusterIP); err != nil || answer.Verdict != Served || answer.Ports[0].Kernel.Written == nil {
		t.Errorf("%+v, %v", answer, err)
	}
	if err := ask("default/web"); err != nil || answer.Ports[0].Tracked.Count != 1 || answer.Ports[0].Tracked.Flows[0].Client != "10.244.1.12:4000" {
		t.Errorf("%+v, %v", answer, err)
	}
	answer = Answer{}
	if err := Ask(t.Context(), dir, "/explain", url.Values{"target": {"default/web"}}, &answer); err != nil || answer.Ports[0].Tracked.Count != 2 || len(answer.Ports[0].Tracked.Flows) != 2 {
		t.Errorf("%+v, %v", answer, err)
	}
	if f := answer.Ports[0].Tracked.Flows; !f[0].Used || f[1] != (Flow{"192.0.2.99:4001", "192.0.2.1:30080", "10.244.1.99:8080", "192.0.2.1:5000", false}) {
		t.Errorf("the tracked connections are %+v", f)
	}
	if err := ask("nonsense"); err == nil || !strings.Contains(err.Error(), `"nonsense" is neither`) {
		t.Errorf("a bad question: %v", err)
	}

	w.removed = true
	want := Compared{"IPv4", []string{}, 0, []string{"-rule of default/web:http"}, 1, nil, ""}
	if err := ask("default/web"); err != nil || answer.Verdict != Unknown || len(answer.Compared) != 1 || !reflect.DeepEqual(answer.Compared[0], want) {
		t.Errorf("without its rules: %+v, %v", answer, err)
	}
	var text strings.Builder
	if answer.Print(&text); !strings.Contains(text.String(), "\n  -rule of default/web:http\n") || !strings.Contains(text.String(), "differences: 1), so the verdict above may be wrong.\n") {
		t.Errorf("without its rules:\n%s", text.String())
	}
	w.removed = false
	if err := ask("default/web"); err != nil || answer.Verdict != Served || !slices.Equal(answer.Compared[0].Holds, []string{"rule of default/web:http"}) {
		t.Errorf("with its rules: %+v, %v", answer, err)
	}

	w.before = []string{"iptables -t nat -A PREROUTING -j CALI"}
	if err := ask("default/web"); err != nil || answer.Verdict != Served || !slices.Equal(answer.Compared[0].Before, w.before) {
		t.Errorf("after other software's rules: %+v, %v", answer, err)
	}
	text.Reset()
	if answer.Print(&text); !strings.Contains(text.String(), "may take packets:\n    iptables -t nat -A PREROUTING -j CALI\n") {
		t.Errorf("after other software's rules:\n%s", text.String())
	}
	w.before = nil

	d.Synced(syncer.SyncReport{Family: 4, Took: 1500 * time.Microsecond, ServicePorts: 1, Current: true, Totals: syncer.Totals{ServicePorts: 1, Endpoints: 3}})
	d.Requested("services", errors.New("connection refused"))
	d.ConfigurationRejected(errors.New("mode: magic"))
	var status Status
	if err := Ask(t.Context(), dir, "/status", nil, &status); err != nil {
		t.Fatal(err)
	}
	f := status.Families[0]
	if status.Well() || status.FailingRequests[0].Error != "connection refused" || f.ServicePorts != 1 || f.LastSync.TookMillis != 1.5 || !strings.Contains(status.Problems[0], "mode: magic") {
		t.Errorf("the status is %+v", status)
	}
	if err := ask(clusterIP); err != nil || !strings.Contains(strings.Join(answer.Problems, "\n"), "the API server gives no services since ") {
		t.Errorf("without an API server: %+v, %v", answer, err)
	}
	d.Requested("services", nil)
	d.ConfigurationRejected(nil)
	d.ForeignRules(plan.IPv4, true)
	for _, target := range []string{clusterIP, "default/web", "10.96.0.99:80"} {
		if err := ask(target); err != nil || answer.Verdict != Unknown || len(answer.Doubts) != 1 || !strings.Contains(strings.Join(answer.Problems, "\n"), "another service proxy may be in force for IPv4") {
			t.Errorf("%s with rules of kube-proxy: %+v, %v", target, answer, err)
		}
	}
	if code, body := page(t, d.Page(), "/services"); code != http.StatusOK || !strings.Contains(body, "<br>Rules of another service proxy may be in force for IPv4, and they come before those of signalbox.") {
		t.Errorf("the page with rules of kube-proxy: %d\n%s", code, body)
	}
	d.ForeignRules(plan.IPv4, false)
	d.ForeignRules(plan.IPv6, true)
	if err := ask(clusterIP); err != nil || answer.Verdict != Served {
		t.Errorf("with rules of kube-proxy in the other family: %+v, %v", answer, err)
	}
	d.ForeignRules(plan.IPv6, false)
	w.problems = []string{"the Node is gone"}
	if err := ask(clusterIP); err != nil || !slices.Equal(answer.Problems, w.problems) {
		t.Errorf("with a problem of the node: %+v, %v", answer, err)
	}
	w.problems = nil
	status = Status{}
	if err := Ask(t.Context(), dir, "/status", nil, &status); err != nil || !status.Well() {
		t.Errorf("the status is %+v, %v", status, err)
	}
}

// diff names what is not written, and does not call it equal.
func TestDiffOfFailingSyncs(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "run")
	w.broken = errors.New("operation not permitted")
	w.served(dir)
	diff := func() (d Diff) {
		t.Helper()
		if err := Ask(t.Context(), dir, "/diff", nil, &d); err != nil {
			t.Fatal(err)
		}
		return d
	}
	if d := diff(); d.ExitCode() != 2 || !strings.Contains(d.Families[0].Error, "nothing is written yet") || !strings.Contains(fmt.Sprint(d), "operation not permitted") {
		t.Errorf("before the first write: %+v", d)
	}
	var answer Answer
	if err := Ask(t.Context(), dir, "/explain", url.Values{"target": {clusterIP}}, &answer); err != nil || answer.Verdict != Unknown || len(answer.Doubts) != 1 {
		t.Errorf("before the first write: %+v, %v", answer, err)
	}
	if err := w.loop.Ask(t.Context(), func() { w.broken = nil }); err != nil {
		t.Fatal(err)
	}
	for d := diff(); d.ExitCode() != 0; d = diff() {
		time.Sleep(10 * time.Millisecond)
	}
	if err := w.loop.Ask(t.Context(), func() { w.broken = errors.New("no buffer space available") }); err != nil {
		t.Fatal(err)
	}
	w.slice.Endpoints = w.slice.Endpoints[:1]
	w.loop.Apply(w.slice.DeepCopy())
	for d := diff(); d.ExitCode() != 1; d = diff() {
		time.Sleep(10 * time.Millisecond)
	}
	if d := diff(); !slices.Contains(d.Families[0].Lines, "the kernel lacks the last change of Service default/web:http") || !strings.Contains(fmt.Sprint(d), "no buffer space available") {
		t.Errorf("after a change that fails: %+v", d)
	}
}

// The status names what objects ask for and do not get, and since when.
func TestObjectProblems(t *testing.T) {
	for _, test := range []struct {
		name    string
		inject  func(w *world)
		problem string // "kind object: field: part of the reason"
	}{
		{"two Services want one external IP", func(w *world) { w.others = append(w.others, w.clone("app", "10.96.0.11", "198.51.100.7")) },
			`Service default/web: spec.externalIPs: port "http" claims 198.51.100.7:80/tcp (IPv4), which Service default/app:http has`},
		{"a bad port", func(w *world) { w.service.Spec.Ports[0].Port = 70000 }, "Service default/web: spec.ports[0].port: 70000 is not a port"},
		{"forbidden addresses", func(w *world) {
			w.slice.Endpoints = w.slice.Endpoints[:1]
			w.slice.Endpoints[0].Addresses = []string{"127.0.0.1"}
		}, `EndpointSlice default/web-1: endpoints[0].addresses[0]: "127.0.0.1" is a loopback`},
		{"a slice of no Service", func(w *world) { w.slice.Labels = nil }, "EndpointSlice default/web-1: metadata.labels: "},
		{"the mode serves it otherwise", func(w *world) { w.problem = "NodePort 30080 is not served on loopback" }, "Service default/web: spec.ports: NodePort 30080 is not served on loopback"},
	} {
		t.Run(strings.ReplaceAll(test.name, " ", "-"), func(t *testing.T) {
			w, dir := newWorld(t), t.TempDir()
			test.inject(w)
			began := time.Now()
			d := w.served(dir)
			d.Synced(syncer.SyncReport{Family: plan.IPv4})
			status := func() (s Status) {
				t.Helper()
				if err := Ask(t.Context(), dir, "/status", nil, &s); err != nil {
					t.Fatal(err)
				}
				return s
			}
			first := status()
			if first.Well() || first.ObjectsWithProblems != 1 || len(first.ObjectProblems) != 1 {
				t.Fatalf("the status is %+v", first)
			}
			p := first.ObjectProblems[0]
			if text := fmt.Sprintf("%s %s: %s: %s", p.Kind, p.Object, p.Field, p.Reason); !strings.HasPrefix(text, test.problem) || p.Since.Before(began.Truncate(time.Microsecond)) {
				t.Errorf("since %v: %s", p.Since, text)
			}
			var text strings.Builder
			if first.Print(&text); !strings.Contains(text.String(), "object problem") {
				t.Errorf("the text is\n%s", text.String())
			}
			if _, body := page(t, d.Page(), "/services"); !strings.Contains(body, p.Kind+" "+p.Object+" since ") {
				t.Errorf("the page lacks the problem:\n%s", body)
			}
			if err := w.loop.Ask(t.Context(), func() {
				w.service.Spec.SessionAffinity, w.slice.Ports[0].Port = corev1.ServiceAffinityClientIP, ptr.To[int32](8081)
				if err := w.change(); err != nil {
					t.Error(err)
				}
			}); err != nil {
				t.Fatal(err)
			}
			if again := status(); len(again.ObjectProblems) != 1 || again.ObjectProblems[0].Since != p.Since {
				t.Errorf("after another change: %+v, was %+v", again, first)
			}
		})
	}
}

// A status has a bounded number of objects with problems, and counts all.
func TestManyObjectProblems(t *testing.T) {
	w, dir := newWorld(t), t.TempDir()
	const more = 30
	for n := range maxObjects + more {
		w.also(fmt.Sprintf("s%02d", n), n, func(s *corev1.Service, _ *discoveryv1.Endpoint) {
			s.Spec.Ports[0].Port, s.Spec.SessionAffinity = 70000, "nonsense"
		})
	}
	w.served(dir)
	var status Status
	if err := Ask(t.Context(), dir, "/status", nil, &status); err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	status.Print(&text)
	if status.ObjectsWithProblems != maxObjects+more || len(status.ObjectProblems) != 2*maxObjects || !strings.Contains(text.String(), fmt.Sprintf("and %d more objects", more)) {
		t.Errorf("of %d objects, the status has %d problems:\n%s", status.ObjectsWithProblems, len(status.ObjectProblems), text.String())
	}
}

// While another program undoes each repair, the node is not well.
func TestFight(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "run")
	d := w.served(dir)
	d.Synced(syncer.SyncReport{Family: plan.IPv4})
	status := func() (s Status) {
		t.Helper()
		if err := Ask(t.Context(), dir, "/status", nil, &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := status(); !s.Well() {
		t.Errorf("before: %+v", s)
	}
	for range 100 {
		w.foreign <- proxier.Writer{Name: "firewalld"}
		if s := status(); !s.Well() {
			if len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "IPv4: the program firewalld has changed") {
				t.Errorf("in the fight: %+v", s)
			}
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the status says nothing of a fight")
}

// Before the source has told all objects, nobody concludes anything from those that are
// known.
func TestSocketBeforeTheFirstSync(t *testing.T) {
	w, dir := newWorld(t), t.TempDir()
	w.halfRead = true
	h := w.served(dir).Page()
	query := url.Values{"target": {"default/web"}}
	var answer Answer
	if err := Ask(t.Context(), dir, "/explain", query, &answer); err != nil || answer.Verdict != Unknown || answer.Sentence != notRead+"." {
		t.Errorf("%+v, %v", answer, err)
	}
	if err := Ask(t.Context(), dir, "/frontends", query, &Frontends{}); err == nil || !strings.Contains(err.Error(), notRead) {
		t.Errorf("a trace learns %v", err)
	}
	var status Status
	if err := Ask(t.Context(), dir, "/status", nil, &status); err != nil || status.Well() || !strings.Contains(status.Problems[0], "not all objects are read yet") {
		t.Errorf("the status is %+v, %v", status, err)
	}
	for _, path := range []string{"/services", "/services/default/web", "/services/default/none"} {
		if code, body := page(t, h, path); code != http.StatusServiceUnavailable || !strings.Contains(body, notRead) {
			t.Errorf("%s: %d, %s", path, code, body)
		}
	}
	w.loop.Synced()
	for answer = (Answer{}); answer.Verdict != Served; {
		if err := Ask(t.Context(), dir, "/explain", query, &answer); err != nil {
			t.Fatal(err)
		}
	}
}

// The connection tracking table is read once for each protocol, however many ports a
// Service has, and not any more when the client has gone.
func TestTableIsReadOnce(t *testing.T) {
	w := newWorld(t)
	w.service.Spec.Ports = nil
	for n := range int32(100) {
		for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
			w.service.Spec.Ports = append(w.service.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("p%d-%s", n, strings.ToLower(string(protocol))), Protocol: protocol, Port: 80 + n, NodePort: 30080 + n})
		}
	}
	w.start()
	ctx, cancel := context.WithCancel(t.Context())
	var read []plan.Protocol
	list := func(family plan.Family, protocol plan.Protocol, fn func(conntrack.Flow)) error {
		read = append(read, protocol)
		if protocol == plan.TCP {
			return flows(family, protocol, fn)
		}
		return nil
	}
	a := w.ask("default/web", "")
	if a.Track(ctx, list, w.loop.NodeAddrs()); !slices.Equal(read, []plan.Protocol{plan.TCP, plan.UDP}) || len(a.Problems) > 0 {
		t.Errorf("the table is read for %v, problems %q", read, a.Problems)
	}
	for i := range a.Ports {
		p := &a.Ports[i]
		if want := map[string]int{"p0-tcp": 2}[p.Port]; p.Tracked.Count != want || len(p.Tracked.Flows) != want {
			t.Errorf("port %s has %+v, want %d", p.Port, p.Tracked, want)
		}
	}
	cancel()
	if a.Track(ctx, list, nil); len(read) != 2 {
		t.Errorf("without a client, the table is read for %v", read[2:])
	}
}

// With a client, the answer has that client's connections, also after many of other clients.
func TestConnectionsOfOneClient(t *testing.T) {
	w := newWorld(t)
	w.start()
	list := func(family plan.Family, protocol plan.Protocol, fn func(conntrack.Flow)) error {
		other := conntrack.Flow{Client: netip.MustParseAddrPort("10.244.1.99:4000"), Frontend: netip.MustParseAddrPort(clusterIP)}
		for range maxFlows + 5 {
			fn(other)
		}
		return flows(family, protocol, fn)
	}
	for from, want := range map[string]string{
		pod:           "\n  tracked connections from 10.244.1.12: 1\n    10.244.1.12:4000  -> 10.96.0.10:80  -> 10.244.1.5:8080\n",
		"10.244.1.13": "\n  tracked connections from 10.244.1.13: 0\n",
		"":            "\n  tracked connections: 26\n",
	} {
		a := w.ask(clusterIP, from)
		a.Track(t.Context(), list, w.loop.NodeAddrs())
		var text strings.Builder
		if a.Print(&text); !strings.Contains(text.String(), want) {
			t.Errorf("from %q:\n%s\nwant %q", from, text.String(), want)
		}
	}
}

// No command waits for ever for a daemon that is frozen.
func TestDaemonDoesNotAnswer(t *testing.T) {
	d := newWorld(t).served(t.TempDir())
	bounds := maps.Clone(askWithin)
	defer func() { askWithin = bounds }()
	for path := range bounds {
		if _, pattern := d.Handler().(*http.ServeMux).Handler(httptest.NewRequest(http.MethodGet, path, nil)); pattern != "GET "+path {
			t.Errorf("the daemon has no %s", path)
		}
		askWithin = map[string]time.Duration{path: time.Millisecond}
		for name, begun := range map[string]string{"no byte": "", "half an answer": "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"} {
			dir := t.TempDir()
			l, err := listen(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
					fmt.Fprint(c, begun)
				}
				<-t.Context().Done()
			}()
			var answer any
			if err := Ask(t.Context(), dir, path, nil, &answer); err == nil || err.Error() != "the running signalbox does not answer within 1ms" {
				t.Errorf("%s, %s: %v", path, name, err)
			}
		}
	}
}

// A second process that serves the namespace takes the socket, and the first leaves it
// alone when it ends. A socket that nobody serves is replaced.
func TestSocketChangesHands(t *testing.T) {
	dir := t.TempDir()
	answer := func(text string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "%q", text) })
	}
	want := func(want string) {
		t.Helper()
		var got string
		if err := Ask(t.Context(), dir, "/status", nil, &got); err != nil || got != want {
			t.Errorf("%q answers, %v; want %q", got, err, want)
		}
	}
	var first, second Socket
	log := slog.New(slog.DiscardHandler)
	first.Open(dir, answer("first"), log)
	want("first")
	second.Open(dir, answer("second"), log)
	want("second")
	first.Close()
	want("second")
	second.Close()
	path, err := socketPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays: %v", err)
	}
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	first.Open(dir, answer("first"), log)
	defer first.Close()
	want("first")
}

// A socket that could not be opened is opened later.
func TestSocketIsTriedAgain(t *testing.T) {
	t.Parallel()
	parent := filepath.Join(t.TempDir(), "run")
	if err := os.WriteFile(parent, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var s Socket
	dir := filepath.Join(parent, "signalbox")
	s.Open(dir, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `"here"`) }), slog.New(slog.DiscardHandler))
	defer s.Close()
	var got string
	if err := Ask(t.Context(), dir, "/status", nil, &got); err == nil {
		t.Fatalf("%q answers without a directory", got)
	}
	if err := os.Remove(parent); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); Ask(t.Context(), dir, "/status", nil, &got) != nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing answers")
		}
	}
}

// In an update that is given up, the new process replaces the socket and ends. The old
// process then listens again. While the new one answers, the old one leaves it.
func TestSocketAfterAbortedUpdate(t *testing.T) {
	t.Parallel()
	answer := func(text string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "%q", text) })
	}
	log := slog.New(slog.DiscardHandler)
	for name, killed := range map[string]bool{"ended": false, "killed": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var first, second Socket
			first.Open(dir, answer("first"), log)
			defer first.Close()
			second.Open(dir, answer("second"), log)
			time.Sleep(httpserve.RetryAfter + time.Second)
			var got string
			if err := Ask(t.Context(), dir, "/status", nil, &got); err != nil || got != "second" {
				t.Errorf("%q answers: %v", got, err)
			}
			second.Close()
			if killed {
				path, err := socketPath(dir)
				if err != nil {
					t.Fatal(err)
				}
				stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
				if err != nil {
					t.Fatal(err)
				}
				stale.SetUnlinkOnClose(false)
				stale.Close()
			}
			for end := time.Now().Add(3 * httpserve.RetryAfter); Ask(t.Context(), dir, "/status", nil, &got) != nil; time.Sleep(50 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("nothing answers")
				}
			}
			if got != "first" {
				t.Errorf("%q answers", got)
			}
		})
	}
}

// askedSocket names the socket for TestOtherUser in a process of another user.
const askedSocket = "SIGNALBOX_TEST_SOCKET"

// Other users than root cannot enter the directory. If they could, they would get no
// answer.
func TestOtherUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the test changes its user and needs root")
	}
	parent, err := os.MkdirTemp("/tmp", "signalbox-socket-") // t.TempDir's parents are for root alone
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(parent)
	if err := os.Chmod(parent, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(parent, "run")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	newWorld(t).served(dir)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory has mode %v, %v", info.Mode(), err)
	}
	socket, err := socketPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	program := copyTest(t, parent)
	connect := func() string {
		t.Helper()
		cmd := exec.Command(program, "-test.run=^TestOtherUser$", "-test.v")
		cmd.Dir, cmd.Env = "/", append(os.Environ(), askedSocket+"="+socket)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if out := connect(); !strings.Contains(out, "permission denied") {
		t.Errorf("another user enters the directory:\n%s", out)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o755, socket: 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	if out := connect(); !strings.Contains(out, "got 0 bytes") {
		t.Errorf("another user gets an answer:\n%s", out)
	}
}

// copyTest copies this program to where another user may run it.
func copyTest(t *testing.T, dir string) string {
	t.Helper()
	text, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "test")
	if err := os.WriteFile(path, text, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestOtherUser is the part of TestOtherUsers that another user runs.
func TestOtherUser(t *testing.T) {
	socket := os.Getenv(askedSocket)
	if socket == "" {
		return
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Log(err)
		return
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /status HTTP/1.1\r\nHost: signalbox\r\n\r\n") // the answer shows whether it was read
	answer, _ := io.ReadAll(conn)
	t.Logf("got %d bytes", len(answer))
}
