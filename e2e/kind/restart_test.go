// SPDX-License-Identifier: Apache-2.0

//go:build kind

package kind

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

// load is traffic that goes on while something is done to signalbox, and must
// not notice.
type load struct {
	stop  context.CancelFunc
	all   sync.WaitGroup
	done  atomic.Int64
	ended atomic.Int64 // lasting connections that a relay ended with itself
	// again counts datagrams without an answer that were sent again. A node that leaves
	// the relay removes its UDP flows from conntrack, and an answer on its way is lost.
	again  atomic.Int64
	mu     sync.Mutex
	failed []string
}

func (l *load) fail(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = append(l.failed, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

// every runs ask again and again, with a pause between, until the load ends.
func (l *load) every(ctx context.Context, pause time.Duration, ask func() error) {
	l.all.Go(func() {
		tick := time.NewTicker(pause)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if err := ask(); err != nil {
					l.fail("%v", err)
				} else {
					l.done.Add(1)
				}
			}
		}
	})
}

// startLoad asks a NodePort of every worker from outside: by new connections,
// by one connection that lasts, and by one UDP flow. next is the mode that follows.
func (s *site) startLoad(svc *corev1.Service, mode, next string) *load {
	s.Helper()
	ctx, stop := context.WithCancel(context.Background())
	l := &load{stop: stop}
	for _, family := range s.families {
		for _, n := range s.workers {
			at := n.addr(s.T, family == corev1.IPv6Protocol)
			tcp := netip.AddrPortFrom(at, uint16(nodePort(svc, "tcp")))
			l.every(ctx, 20*time.Millisecond, func() error {
				_, err := ask(context.Background(), "tcp", tcp, "hostname")
				return describe("a new connection to", tcp, err)
			})
			l.lasting(ctx, tcp, mode == relay)
			udp := netip.AddrPortFrom(at, uint16(nodePort(svc, "udp")))
			flow, err := net.Dial("udp", udp.String())
			s.must(err)
			s.Cleanup(func() { flow.Close() })
			lossy := mode == relay && next != relay
			l.every(ctx, 50*time.Millisecond, func() error {
				_, err := askOn(flow, "hostname")
				if lossy && errors.Is(err, os.ErrDeadlineExceeded) {
					lossy = false
					l.again.Add(1)
					_, err = askOn(flow, "hostname")
				}
				return describe("the flow to", udp, err)
			})
		}
	}
	return l
}

func describe(what string, to netip.AddrPort, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", what, to, err)
}

// lasting makes many requests on one connection. That it ends is a failure; or
// counted, where the mode may end it, and another one takes its place.
func (l *load) lasting(ctx context.Context, to netip.AddrPort, mayEnd bool) {
	var kept *keptConn
	l.every(ctx, 50*time.Millisecond, func() (err error) {
		if kept == nil {
			if kept, err = keep(to); err != nil {
				return describe("a lasting connection to", to, err)
			}
		}
		if err = kept.ask(); err == nil {
			return nil
		}
		kept.Close()
		kept = nil
		if mayEnd {
			l.ended.Add(1)
			return nil
		}
		return describe("the lasting connection to", to, err)
	})
}

// keptConn is one connection for many requests. http.Client would now and then
// take another one without a word.
type keptConn struct {
	net.Conn
	in *bufio.Reader
}

func keep(to netip.AddrPort) (*keptConn, error) {
	conn, err := net.DialTimeout("tcp", to.String(), answerWithin)
	if err != nil {
		return nil, err
	}
	return &keptConn{conn, bufio.NewReader(conn)}, nil
}

func (c *keptConn) ask() error {
	if err := c.SetDeadline(time.Now().Add(answerWithin)); err != nil {
		return err
	}
	req, err := http.NewRequest(http.MethodGet, "http://lasting/hostname", nil)
	if err != nil {
		return err
	}
	if err := req.Write(c); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.in, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// end stops the load and wants it to have gone on without a failure.
func (l *load) end(s *site) {
	s.Helper()
	l.stop()
	l.all.Wait()
	s.Logf("%d requests from outside, %d failed; %d lasting connections ended; %d datagrams sent again",
		l.done.Load(), len(l.failed), l.ended.Load(), l.again.Load())
	if l.done.Load() == 0 {
		s.Error("nothing was asked")
	}
	for _, f := range l.failed[:min(len(l.failed), 20)] {
		s.Error(f)
	}
}

// podLoad is a Pod that opens new connections to a cluster IP in a loop and
// says which failed.
const podLoad = "load"

func (s *site) startPodLoad(target string) {
	s.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: podLoad},
		Spec: corev1.PodSpec{
			NodeName: s.workers[1].name, TerminationGracePeriodSeconds: ptr.To[int64](0), RestartPolicy: corev1.RestartPolicyNever,
			Containers: []corev1.Container{{
				Name: "load", Image: setting("AGNHOST_IMAGE", "registry.k8s.io/e2e-test-images/agnhost:2.53"),
				Command: []string{"sh", "-c", `while :; do
					if curl -g -q -s -o /dev/null --connect-timeout 10 --max-time 20 "http://$TARGET/hostname"; then echo ok; else echo "failed $? $(date)"; fi
				done`},
				Env: []corev1.EnvVar{{Name: "TARGET", Value: target}},
			}},
		},
	}
	_, err := s.client.CoreV1().Pods(playground).Create(s.Context(), pod, metav1.CreateOptions{})
	s.must(err)
	s.Cleanup(func() {
		s.must(s.client.CoreV1().Pods(playground).Delete(context.WithoutCancel(s.Context()), podLoad, metav1.DeleteOptions{}))
	})
	s.podReady(podLoad)
}

// endPodLoad wants no failure, and some success.
func (s *site) endPodLoad() {
	s.Helper()
	stream, err := s.client.CoreV1().Pods(playground).GetLogs(podLoad, &corev1.PodLogOptions{}).Stream(s.Context())
	s.must(err)
	defer stream.Close()
	text, err := io.ReadAll(stream)
	s.must(err)
	ok := strings.Count(string(text), "ok\n")
	s.Logf("%d connections from a Pod", ok)
	if ok == 0 {
		s.Error("nothing was asked from the Pod")
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "failed") {
			s.Errorf("from the Pod: %s", line)
		}
	}
}

// underLoad does something to nodes in a mode while Pods and the outside go on
// as if nothing were. next is the mode afterwards.
func (s *site) underLoad(mode, next string, do func()) {
	s.Helper()
	svc := s.fresh("busy", bothServers, func(spec *corev1.ServiceSpec) { spec.Type = corev1.ServiceTypeNodePort })
	for _, family := range s.families {
		for _, n := range s.workers {
			for _, network := range []string{"tcp", "udp"} {
				at := netip.AddrPortFrom(n.addr(s.T, family == corev1.IPv6Protocol), uint16(nodePort(svc, network)))
				s.outsideReaches(network, at, serverA, serverB)
			}
		}
	}
	s.reaches(client, "tcp", svc.Spec.ClusterIP, 80, serverA, serverB)
	s.startPodLoad(net.JoinHostPort(svc.Spec.ClusterIP, "80"))
	l := s.startLoad(svc, mode, next)
	do()
	l.end(s)
	s.endPodLoad()
}

// kill ends the Pod of a node at once, and waits for the next one.
func (s *site) kill(on string) {
	s.Helper()
	for _, p := range s.pods(s.Context()) {
		if p.Spec.NodeName == on {
			s.must(s.client.CoreV1().Pods(namespace).Delete(s.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: ptr.To[int64](0)}))
			s.eventually("another Pod on "+on, func(ctx context.Context) error {
				for _, now := range s.pods(ctx) {
					if now.Spec.NodeName == on && now.UID != p.UID {
						return nil
					}
				}
				return errors.New("none")
			})
		}
	}
	s.rolledOut()
}
