package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/cmd/lab/internal/measure"
	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
	"signalbox/internal/wait"
	"signalbox/proxier/plan"
)

const (
	clientPod = "pod-x"
	// bulkPod holds the addresses of all endpoints but the moving one.
	bulkPod = "pod-b"
	// startTimeout bounds the start of a proxy. A proxy that needs longer is reported as
	// one that does not come up.
	startTimeout = 8 * time.Minute
	moveTimeout  = 3 * time.Minute
	// probes is how many virtual IPs are asked, evenly spread over all.
	probes = 500
	// stormRate is how many endpoints change in a second of a storm.
	stormRate = 100
	stormTime = 10 * time.Second
	// tidyTime is for what a proxy does once, some time after its start.
	tidyTime = 10 * time.Second
	restTime = 20 * time.Second
)

// movingPods are those between which the moving Service's endpoint goes to and fro.
var movingPods = []string{"pod-a", "pod-c"}

// trial measures one proxy once. figures are in seconds, bytes or shares.
type trial struct {
	*objects
	bed     *testbed.Bed
	proxy   testbed.Proxy
	process *cluster.Process
	moves   int
	at      int // index in movingPods of where the endpoint is
	figures map[string]float64
	moved   []float64 // the latencies of moves at rest, in seconds
	log     func(format string, args ...any)
}

func (t *trial) run(ctx context.Context) error {
	if err := t.answerEverywhere(); err != nil {
		return err
	}
	defer func() {
		if t.process != nil {
			t.process.Kill()
		}
	}()
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"cold start", t.coldStart}, {"rest", t.rest}, {"moves", t.move}, {"connections", t.connect},
		{"storm", t.storm}, {"restart", t.restart}, {"restart after changes", t.restartChanged},
	} {
		t.log("  %s: %s", t.proxy.Name(), step.name)
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("%s: %s: %w; its log ends with\n%s", t.proxy.Name(), step.name, err, t.tail())
		}
	}
	return nil
}

func (t *trial) tail() string {
	if t.process == nil {
		return ""
	}
	return t.process.Tail(10)
}

// answerEverywhere makes a Pod answer at the addresses of all endpoints.
func (t *trial) answerEverywhere() error {
	for _, f := range t.families {
		if err := t.bed.Lab.GiveRange(endpointRanges[f], bulkPod); err != nil {
			return err
		}
	}
	l, err := t.bed.Lab.Host(bulkPod).Listen("tcp", ":"+strconv.Itoa(bulkPort))
	if err != nil {
		return err
	}
	go func() { // ends with the lab's namespace: nobody connects any more
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return nil
}

func (t *trial) start() (began time.Time, err error) {
	began = time.Now()
	t.process, err = t.bed.Start(t.proxy)
	return began, err
}

func (t *trial) stop() error {
	p := t.process
	t.process = nil
	return testbed.Stop(p)
}

func (t *trial) coldStart(ctx context.Context) error {
	began, err := t.start()
	if err != nil {
		return err
	}
	if err := t.allAnswer(ctx); err != nil {
		return err
	}
	t.figures["cold_wall"] = time.Since(began).Seconds()
	used, err := settle(ctx, t.process.Pid())
	t.figures["cold_cpu"], t.figures["memory_peak"] = used.processor.Seconds(), used.peak
	t.figures["cold_bytes"] = float64(t.bed.Relay.Answered())
	return err
}

// allAnswer waits until the virtual IPs answer, one after another.
func (t *trial) allAnswer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return t.bed.Lab.Host(clientPod).Do(func() error {
		dialer := net.Dialer{Timeout: 100 * time.Millisecond}
		for _, f := range t.families {
			for i := range min(probes, t.services) {
				n := (i + 1) * t.services / min(probes, t.services)
				at := netip.AddrPortFrom(t.clusterIP(f, n), 80).String()
				for {
					c, err := dialer.DialContext(ctx, "tcp", at)
					if err == nil {
						c.Close()
						break
					}
					if ended := t.alive(ctx); ended != nil {
						return fmt.Errorf("%s does not answer: %w", at, ended)
					}
					time.Sleep(2 * time.Millisecond)
				}
			}
		}
		return nil
	})
}

// alive says why it is of no use to wait longer.
func (t *trial) alive(ctx context.Context) error {
	select {
	case <-t.process.Done():
		return fmt.Errorf("the proxy ended: %w", t.process.Err())
	default:
		return ctx.Err()
	}
}

func (t *trial) rest(ctx context.Context) error {
	if !wait.For(ctx, tidyTime) {
		return ctx.Err()
	}
	before, err := usageOf(t.process.Pid())
	if err != nil {
		return err
	}
	if !wait.For(ctx, restTime) {
		return ctx.Err()
	}
	after, err := usageOf(t.process.Pid())
	t.figures["rest_cpu"] = (after.processor - before.processor).Seconds() * float64(time.Minute/restTime)
	t.figures["memory_settled"] = after.resident
	return err
}

// moveOnce moves the endpoint, and returns how long the old one answered from the
// beginning of the API write.
func (t *trial) moveOnce(ctx context.Context, f plan.Family) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, moveTimeout)
	defer cancel()
	t.at = 1 - t.at
	began := time.Now()
	if err := t.objects.move(ctx, f, t.bed.Lab.Host(movingPods[t.at]).Addr.Of(f)); err != nil {
		return 0, err
	}
	return time.Since(began) + t.awaitMove(ctx, f), t.alive(ctx)
}

func (t *trial) awaitMove(ctx context.Context, f plan.Family) time.Duration {
	began := time.Now()
	target := netip.AddrPortFrom(t.clusterIP(f, t.services), 80)
	for ctx.Err() == nil {
		once, cancel := context.WithTimeout(ctx, time.Second)
		answer, err := t.bed.Lab.Host(clientPod).Ask(once, "tcp", netip.AddrPort{}, target)
		cancel()
		if err == nil && answer.Server == movingPods[t.at] {
			break
		}
	}
	return time.Since(began)
}

func (t *trial) move(ctx context.Context) error {
	before, err := usageOf(t.process.Pid())
	if err != nil {
		return err
	}
	var took []time.Duration
	for i := range t.moves {
		d, err := t.moveOnce(ctx, t.families[i*len(t.families)/t.moves])
		if err != nil {
			return err
		}
		took = append(took, d)
		t.moved = append(t.moved, d.Seconds())
	}
	used, err := settle(ctx, t.process.Pid())
	t.figures["move_p50"], t.figures["move_p99"] = measure.Quantile(took, 0.5).Seconds(), measure.Quantile(took, 0.99).Seconds()
	t.figures["move_cpu"] = (used.processor - before.processor).Seconds() / float64(t.moves)
	return err
}

// storm changes endpoints at a steady rate, and moves one Service meanwhile.
func (t *trial) storm(ctx context.Context) error {
	before, err := usageOf(t.process.Pid())
	if err != nil {
		return err
	}
	received := t.bed.Relay.Answered()
	storm, stop := context.WithTimeout(ctx, stormTime)
	defer stop()
	changed := make(chan error, 1)
	go func() {
		tick := time.NewTicker(time.Second / stormRate)
		defer tick.Stop()
		for {
			select {
			case <-storm.Done():
				changed <- nil
				return
			case <-tick.C:
				if err := t.churn(ctx); err != nil {
					changed <- err
					return
				}
			}
		}
	}()
	var took []time.Duration
	for storm.Err() == nil {
		d, err := t.moveOnce(ctx, t.families[0])
		if err != nil {
			return err
		}
		took = append(took, d)
		wait.For(storm, 100*time.Millisecond)
	}
	if err := <-changed; err != nil {
		return err
	}
	used, err := settle(ctx, t.process.Pid())
	t.figures["storm_cpu"] = (used.processor - before.processor).Seconds() / stormTime.Seconds()
	t.figures["storm_bytes"] = float64(t.bed.Relay.Answered()-received) / stormTime.Seconds()
	t.figures["storm_p50"], t.figures["storm_p99"] = measure.Quantile(took, 0.5).Seconds(), measure.Quantile(took, 0.99).Seconds()
	return err
}

// restart starts the proxy again with nothing changed. Virtual IPs answer all the time,
// so the proxy's own metric tells when it has synced.
func (t *trial) restart(ctx context.Context) error {
	if err := t.stop(); err != nil {
		return err
	}
	began, err := t.start()
	if err != nil {
		return err
	}
	if err := t.synced(ctx); err != nil {
		return err
	}
	t.figures["restart_wall"] = time.Since(began).Seconds()
	used, err := settle(ctx, t.process.Pid())
	t.figures["restart_cpu"] = used.processor.Seconds()
	return err
}

// restartChanged changes a tenth of the Services, at most 1,000, while no proxy runs.
func (t *trial) restartChanged(ctx context.Context) error {
	if err := t.stop(); err != nil {
		return err
	}
	for range min(t.services/10+1, 1000) {
		if err := t.churn(ctx); err != nil {
			return err
		}
	}
	f := t.families[0]
	t.at = 1 - t.at
	if err := t.objects.move(ctx, f, t.bed.Lab.Host(movingPods[t.at]).Addr.Of(f)); err != nil {
		return err
	}
	began, err := t.start()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	t.awaitMove(ctx, f)
	t.figures["changed_wall"] = time.Since(began).Seconds()
	if err := t.alive(ctx); err != nil {
		return err
	}
	used, err := settle(ctx, t.process.Pid())
	t.figures["changed_cpu"] = used.processor.Seconds()
	return errors.Join(err, t.stop())
}

// lastSync is the metric that both proxies set to the time of each sync.
const lastSync = "kubeproxy_sync_proxy_rules_last_timestamp_seconds"

func (t *trial) synced(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	client := t.bed.Lab.Host("node1").Client()
	defer client.CloseIdleConnections()
	for {
		n, err := syncedFamilies(ctx, client)
		if err == nil && n >= len(t.families) {
			return nil
		}
		if err := t.alive(ctx); err != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond) // each scrape costs the proxy processor time
	}
}

// syncedFamilies counts the samples of lastSync that are set: one for each family.
func syncedFamilies(ctx context.Context, client *http.Client) (n int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:10249/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if v, _ := strconv.ParseFloat(value, 64); strings.HasPrefix(name, lastSync) && v > 0 {
			n++
		}
	}
	return n, err
}

// connect times new connections through the virtual IP beside straight to the Pod, from a
// Pod and from the node, and questions on open connections.
func (t *trial) connect(ctx context.Context) error {
	if t.at != 0 {
		if _, err := t.moveOnce(ctx, t.families[0]); err != nil {
			return err
		}
	}
	f := t.families[0]
	virtual := netip.AddrPortFrom(t.clusterIP(f, t.services), 80)
	direct := netip.AddrPortFrom(t.bed.Lab.Host(movingPods[0]).Addr.Of(f), movingPort)
	for host, prefix := range map[string]string{clientPod: "connect", "node1": "node_connect"} {
		lat, err := connects(ctx, t.bed.Lab.Host(host), virtual, direct)
		if err != nil {
			return err
		}
		through, straight := measure.Median(lat.Through), measure.Median(lat.Direct)
		t.figures[prefix+"_p50"], t.figures[prefix+"_p99"] = through.Seconds(), measure.Quantile(lat.Through, 0.99).Seconds()
		t.figures[prefix+"_direct"] = straight.Seconds()
		t.figures[prefix+"_added"] = (through - straight).Seconds()
	}
	return t.exchange(ctx, virtual)
}

// connects times connections from a host to two addresses, which take turns.
func connects(ctx context.Context, host *netlab.Host, virtual, direct netip.AddrPort) (lat measure.Latencies, err error) {
	err = host.Do(func() error {
		lat, err = measure.TakeTurns(ctx, virtual, direct)
		return err
	})
	return lat, err
}

// exchange times a question and its answer on one open connection.
func (t *trial) exchange(ctx context.Context, virtual netip.AddrPort) error {
	c, err := t.bed.Lab.Host(clientPod).Open(ctx, "tcp", netip.AddrPort{}, virtual)
	if err != nil {
		return err
	}
	defer c.Close()
	var took []time.Duration
	for range 2000 {
		began := time.Now()
		if _, err := c.Ask(ctx); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		took = append(took, time.Since(began))
	}
	t.figures["exchange_p50"] = measure.Median(took).Seconds()
	return nil
}
