//go:build kind

package kind

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
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
	stop   context.CancelFunc
	all    sync.WaitGroup
	done   atomic.Int64
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
// by one connection that lasts, and by one UDP flow.
func (s *site) startLoad(svc *corev1.Service) *load {
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
			l.lasting(ctx, tcp)
			udp := netip.AddrPortFrom(at, uint16(nodePort(svc, "udp")))
			flow, err := net.Dial("udp", udp.String())
			s.must(err)
			s.Cleanup(func() { flow.Close() })
			l.every(ctx, 50*time.Millisecond, func() error {
				_, err := askOn(flow, "hostname")
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

// lasting makes many requests on one connection. A second connection is a
// failure: the first was lost.
func (l *load) lasting(ctx context.Context, to netip.AddrPort) {
	var dialled atomic.Int64
	dialer := &net.Dialer{}
	once := &http.Client{Timeout: answerWithin, Transport: &http.Transport{
		MaxConnsPerHost: 1,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dialled.Add(1) > 1 {
				return nil, errors.New("the connection that should last was lost")
			}
			return dialer.DialContext(ctx, network, addr)
		},
	}}
	l.every(ctx, 50*time.Millisecond, func() error {
		resp, err := once.Get("http://" + to.String() + "/hostname")
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		return describe("the lasting connection to", to, err)
	})
}

// end stops the load and wants it to have gone on without a failure.
func (l *load) end(s *site) {
	s.Helper()
	l.stop()
	l.all.Wait()
	s.Logf("%d requests from outside, %d failed", l.done.Load(), len(l.failed))
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

// testRestart starts every Pod of the DaemonSet anew, then kills one without
// warning.
func (s *site) testRestart() {
	s.underLoad(func() {
		s.restart()
		s.kill(s.workers[1].name)
	})
}

// underLoad does something while Pods and the outside go on as if nothing were.
func (s *site) underLoad(do func()) {
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
	l := s.startLoad(svc)
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
