// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"encoding/json"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"signalbox/explain"
	"signalbox/internal/netlab"
	"signalbox/modes"
	"signalbox/proxier/plan"
)

// TestTrace follows real connections through the rules of each mode. A connection that was
// open before is shown, too. The kernel has what was written.
func TestTrace(t *testing.T) {
	for _, mode := range []string{"nftables", "iptables", "ipvs", "userspace"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			traceIn(t, mode)
		})
	}
}

func traceIn(t *testing.T, mode string) {
	binary, lab, dir := build(t), newLab(t), t.TempDir()
	node := lab.Host("node1")
	dataplane, err := modes.Named(mode)
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Do(func() error { return dataplane.Supported(plan.IPv4) }); err != nil {
		t.Skip(err)
	}
	d := startDaemon(t, node, binary, serviceTo(t, lab.Host("pod-a")), "--mode="+mode, "--run-dir="+dir)
	defer d.stop()
	web, nodePort := netip.MustParseAddrPort("10.96.0.10:80"), netip.AddrPortFrom(node.Addr.V4, 30080)
	eventually(t, "the Service answers", func() bool { return answers(t, lab.Host("pod-x"), web, soon) })
	relayed := mode == "userspace"
	before := open(t, lab.Host("pod-x"), web, relayed)
	defer before.conn.Close()

	var out, failed heard
	trace := exec.Command(binary, "trace", "default/web", "-o", "json", "--run-dir="+dir)
	trace.Stdout, trace.Stderr = &out, &failed
	if err := node.Start(trace); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the open connection is shown", func() bool { return slices.Contains(out.steps(t, before), "open") })
	for _, c := range []traced{open(t, lab.Host("pod-x"), web, relayed), open(t, lab.Host("client1"), nodePort, relayed)} {
		c.conn.Close()
		eventually(t, "a connection is shown", func() bool { return slices.Contains(out.steps(t, c), "closing") })
		if got := strings.Join(out.steps(t, c), " "); got != "new answered closing" {
			t.Errorf("the connection from %s has the steps %q", c.local, got)
		}
	}
	if err := trace.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := trace.Wait(); err != nil {
		t.Errorf("trace ends with %v: %s", err, failed.text.String())
	}
	if text, err := runOn(node, binary, "diff", "--run-dir="+dir); err != nil || text != "" {
		t.Errorf("diff says %q, %v", text, err)
	}
	if text, err := runOn(node, binary, "explain", "default/web", "--run-dir="+dir); err != nil || !strings.Contains(text, "differences: 0\n") || strings.Contains(text, "as written: 0") {
		t.Errorf("explain says %v\n%s", err, text)
	}
	if text, err := runOn(lab.Host("node2"), binary, "trace", "default/web", "--run-dir="+dir); err == nil || !strings.Contains(text, "conntrack -E") {
		t.Errorf("without a daemon, trace says %q, %v", text, err)
	}
	if text, err := runOn(node, binary, "trace", "default/none", "--run-dir="+dir); err == nil || !strings.Contains(text, "There is no Service default/none") {
		t.Errorf("about a Service that does not exist, trace says %q, %v", text, err)
	}
}

// traced is a connection that was answered.
type traced struct {
	conn      *netlab.Conn
	local, to netip.AddrPort
	answer    netlab.Answer
	relayed   bool
}

func open(t *testing.T, from *netlab.Host, to netip.AddrPort, relayed bool) traced {
	t.Helper()
	conn, err := from.Open(t.Context(), "tcp", netip.AddrPort{}, to)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := conn.Ask(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return traced{conn, conn.Local(), to, answer, relayed}
}

// steps returns what is shown of a connection. The kernel must have translated it to the
// server that answered, and the source to what that server saw. A relay hides both.
func (h *heard) steps(t *testing.T, c traced) (steps []string) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for line := range strings.Lines(h.text.String()) {
		var l explain.TraceLine
		if !strings.HasSuffix(line, "\n") {
			break // the rest comes
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if l.Client != c.local.String() {
			continue
		}
		translated := l.Endpoint == c.answer.At.String() && l.Source == c.answer.Seen.String()
		if l.Service != "default/web" || l.Port != "http" || l.Frontend != c.to.String() || l.Relayed != c.relayed || !translated && !c.relayed {
			t.Errorf("%s, which got an answer of %s, is shown as %s", c.local, c.answer, line)
		}
		steps = append(steps, l.Event)
	}
	return steps
}
