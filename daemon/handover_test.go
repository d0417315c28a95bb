package daemon_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/netlab"
)

// manager is as much of a service manager as keeping sockets takes.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
	// said has the messages other than those about sockets, in order.
	said chan string

	mu    sync.Mutex
	names []string
	files []*os.File
}

func newManager(t *testing.T) *manager {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, conn: conn, said: make(chan string, 100)}
	t.Cleanup(func() {
		conn.Close()
		for _, f := range m.files {
			f.Close()
		}
	})
	go m.listen()
	return m
}

func (m *manager) listen() {
	text, oob := make([]byte, 4096), make([]byte, 4096)
	for {
		n, oobn, _, _, err := m.conn.ReadMsgUnix(text, oob)
		if err != nil {
			return
		}
		name, isStored := strings.CutPrefix(string(text[:n]), "FDSTORE=1\nFDPOLL=0\nFDNAME=")
		if !isStored {
			m.said <- string(text[:n])
			continue
		}
		messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil || len(fds) != 1 {
			m.t.Errorf("%s came with %v, error %v", name, fds, err)
			return
		}
		m.mu.Lock()
		m.names, m.files = append(m.names, name), append(m.files, os.NewFile(uintptr(fds[0]), name))
		m.mu.Unlock()
	}
}

// hear waits for a message.
func (m *manager) hear(what string) {
	m.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case said := <-m.said:
			if said == what {
				return
			}
		case <-deadline:
			m.t.Fatalf("%q was never said", what)
		}
	}
}

// start starts a program with the sockets that there are.
func (m *manager) start(node *netlab.Host, program string, args ...string) *exec.Cmd {
	m.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	// Only the new process itself knows its number.
	script := []string{"-c", `export LISTEN_PID=$$; exec "$0" "$@"`, program}
	cmd := exec.Command("sh", append(script, args...)...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.conn.LocalAddr().String(),
		fmt.Sprintf("LISTEN_FDS=%d", len(m.files)), "LISTEN_FDNAMES="+strings.Join(m.names, ":"))
	cmd.ExtraFiles = m.files
	cmd.Stderr = m.t.Output()
	if err := node.Start(cmd); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

// Who connects while no relay runs waits for the next one, and is served.
func TestRelayRestartsWithItsSockets(t *testing.T) {
	t.Parallel()
	binary, source := build(t), t.TempDir()
	lab := newLab(t)
	if err := os.WriteFile(filepath.Join(source, "web.yaml"), relayedManifest(lab.Host("pod-a").Addr), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"run", "--source", source, "--mode", "userspace", "--hostname-override", "node1", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"}
	m := newManager(t)
	for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		old := m.start(lab.Host("node1"), binary, args...)
		m.hear("READY=1")
		if got := asked(t, lab, "tcp", "10.96.0.10:80"); got != nil {
			t.Fatalf("before the restart: %v", got)
		}
		if err := old.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		old.Wait()
		if n := len(m.names); n != 12 {
			t.Fatalf("the service manager has %d sockets, want one for each family, protocol and origin: %v", n, m.names)
		}
		var clients []*netlab.Conn
		for _, network := range []string{"tcp", "udp"} {
			for _, vip := range []string{"10.96.0.10:80", "[fd00:10:96::10]:80"} {
				c, err := lab.Host("pod-x").Open(t.Context(), network, netip.AddrPort{}, netip.MustParseAddrPort(vip))
				if err != nil {
					t.Fatalf("after %v no %s connection to %s waits: %v", signal, network, vip, err)
				}
				defer c.Close()
				clients = append(clients, c)
			}
		}
		answers := make(chan error, len(clients))
		for _, c := range clients {
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				_, err := c.Ask(ctx)
				answers <- err
			}()
		}
		next := m.start(lab.Host("node1"), binary, args...)
		for range clients {
			if err := <-answers; err != nil {
				t.Errorf("after %v: %v", signal, err)
			}
		}
		m.hear("READY=1")
		for _, c := range clients {
			c.Close() // the relay waits for them when it ends
		}
		next.Process.Signal(syscall.SIGTERM)
		if err := next.Wait(); err != nil {
			t.Errorf("the next one ended with %v", err)
		}
	}
}

// Without a service manager that keeps its sockets a relay says what its end
// means; with one there is nothing to say.
func TestRelaySaysThatItsSocketsAreNotKept(t *testing.T) {
	t.Parallel()
	binary, source := build(t), t.TempDir()
	lab := newLab(t)
	m := newManager(t)
	for _, c := range []struct {
		socket string
		lines  int
	}{{"", 2}, {m.conn.LocalAddr().String(), 0}} {
		ctx, stop := context.WithTimeout(t.Context(), patience)
		defer stop()
		cmd := exec.CommandContext(ctx, binary, "run", "--source", source, "--mode", "userspace", "--hostname-override", "node1")
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+c.socket)
		said, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := lab.Host("node1").Start(cmd); err != nil {
			t.Fatal(err)
		}
		lines := 0
		// The start is over when both families have been written.
		for in, synced := bufio.NewScanner(said), 0; synced < 2; {
			if !in.Scan() {
				t.Fatalf("it ended: %v", in.Err())
			}
			if strings.Contains(in.Text(), "no service manager keeps the relay's sockets") {
				lines++
			}
			if strings.Contains(in.Text(), "everything=true") {
				synced++
			}
		}
		if lines != c.lines {
			t.Errorf("with the service manager at %q it was said %d times, want %d", c.socket, lines, c.lines)
		}
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// Sockets that no mode wants are closed, and the service manager is told.
func TestSocketsOfAnotherModeAreForgotten(t *testing.T) {
	t.Parallel()
	binary, source := build(t), t.TempDir()
	lab := newLab(t)
	m := newManager(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	m.names, m.files = []string{"relay-ipv4-tcp-pods-10361"}, []*os.File{f}
	m.start(lab.Host("node1"), binary, "run", "--source", source, "--mode", "nftables", "--hostname-override", "node1")
	m.hear("FDSTOREREMOVE=1\nFDNAME=relay-ipv4-tcp-pods-10361")
}

func asked(t *testing.T, lab *netlab.Lab, network, at string) error {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := lab.Host("pod-x").Ask(ctx, network, netip.AddrPort{}, netip.MustParseAddrPort(at))
	return err
}

func relayedManifest(pod netlab.Pair) []byte {
	var b bytes.Buffer
	b.WriteString(`apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:10:96::10"]
  ports: [{name: tcp, port: 80, protocol: TCP}, {name: udp, port: 80, protocol: UDP}]
`)
	for family, a := range map[string]netip.Addr{"IPv4": pod.V4, "IPv6": pod.V6} {
		fmt.Fprintf(&b, `---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-%s, labels: {kubernetes.io/service-name: web}}
addressType: %s
ports: [{name: tcp, port: 8080, protocol: TCP}, {name: udp, port: 8080, protocol: UDP}]
endpoints: [{addresses: ["%s"]}]
`, strings.ToLower(family), family, a)
	}
	return b.Bytes()
}
