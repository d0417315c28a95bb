// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"signalbox/internal/cluster"
	"signalbox/internal/measure"
	"signalbox/internal/testbed"
	"signalbox/internal/wait"
	"signalbox/internal/xtables"
	"signalbox/proxier/plan"
)

const (
	clientPod = "pod-x"
	// othersPod holds the addresses of all endpoints but those of the moving and of the
	// fixed Service.
	othersPod = "pod-b"
	// startTimeout bounds the start of a proxy. A proxy that needs longer is reported as
	// one that does not come up.
	startTimeout = 8 * time.Minute
	moveTimeout  = 3 * time.Minute
	// No move begins after movesTime, except for the first leastMoves.
	movesTime  = 15 * time.Second
	leastMoves = 4
	// afterMove is how long a proxy works on a move after its first packet.
	afterMove = 500 * time.Millisecond
	// beforeMove makes the pause between two moves longer than a second: kube-proxy would
	// otherwise wait for its minSyncPeriod.
	beforeMove = 700 * time.Millisecond
	// probes is how many virtual IPs are asked, evenly spread over all.
	probes = 500
	// stormRate is how many endpoints change in a second of a storm.
	stormRate = 100
)

// durations are how long the parts of a trial take.
type durations struct {
	// tidy is for what a proxy does once, some time after its start.
	tidy, rest, storm time.Duration
	// rate is for one measurement of a rate.
	rate time.Duration
}

var (
	usual = durations{tidy: 10 * time.Second, rest: 10 * time.Second, storm: 10 * time.Second, rate: 500 * time.Millisecond}
	short = durations{rest: time.Second, storm: time.Second, rate: 20 * time.Millisecond}
)

// movingPods are those between which the moving Service's endpoint goes to and fro.
var movingPods = []string{"pod-a", "pod-c"}

// trial measures one proxy once. figures are in seconds, bytes or shares.
type trial struct {
	*objects
	bed     *testbed.Bed
	proxy   testbed.Proxy
	process *cluster.Process
	memory  *measure.MemoryGroup // nil where the machine cannot make one
	moves   int
	times   durations
	at      map[plan.Family]int // index in movingPods of where the endpoint is
	floor   floor
	figures map[string]float64
	floors  map[string]float64 // of this proxy alone, by the name of the figure
	moved   []float64          // the latencies of moves at rest, in seconds
	log     func(format string, args ...any)
}

func (t *trial) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer t.end()
	if err := t.listen(ctx); err != nil {
		return err
	}
	// Earlier trials left the moving endpoint anywhere.
	for _, f := range t.families {
		if err := t.objects.move(ctx, f, t.bed.Lab.Host(movingPods[0]).Addr.Of(f)); err != nil {
			return err
		}
	}
	for _, step := range t.steps() {
		t.log("  %s: %s", t.proxy.Name(), step.name)
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("%s: %s: %w; its log ends with\n%s", t.proxy.Name(), step.name, err, t.tail())
		}
	}
	return t.stop()
}

// end leaves no process and no control group behind.
func (t *trial) end() {
	if t.process != nil {
		t.process.Kill()
	}
	if t.memory != nil {
		_ = t.memory.Remove()
	}
}

type step struct {
	name string
	do   func(context.Context) error
}

// steps end with those that fill the node's table of connections: kube-proxy reads it at
// each sync.
func (t *trial) steps() []step {
	if t.proxy.Variant != "" {
		return []step{{"cold start", t.coldStart}, {"storm", t.storm}}
	}
	if t.proxy.Program == haproxyProgram {
		return []step{{"connections without rules", t.plainConnect}, {"start", t.startHAProxy}, {"connections", t.connections}}
	}
	steps := []step{{"connections without rules", t.plainConnect}, {"cold start", t.coldStart}, {"rest", t.rest}}
	if t.proxy.Tools == string(xtables.Legacy) {
		steps = append(steps, step{"the tools alone", t.toolsFloor})
	}
	return append(steps, []step{
		{"moves", t.move}, {"storm", t.storm},
		{"restart", t.restart}, {"restart after changes", t.restartChanged},
		{"connections", t.connections}, {"datagrams", t.datagrams},
	}...)
}

func (t *trial) tail() string {
	if t.process == nil {
		return ""
	}
	return t.process.Tail(10)
}

func (t *trial) start() (began time.Time, err error) {
	began = time.Now()
	if t.process, err = t.bed.Start(t.proxy); err != nil {
		return began, err
	}
	if t.memory != nil {
		err = t.memory.Add(t.process.Pid())
	}
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
	used, err := measure.Settle(ctx, t.process.Pid())
	t.figures["cold_cpu"], t.figures["memory_peak"] = used.Processor.Seconds(), used.Peak
	t.setReceived("cold_bytes", 0, 1)
	return err
}

// allAnswer waits until the virtual IPs answer, one after another.
func (t *trial) allAnswer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return t.bed.Lab.Host(clientPod).Do(func() error {
		for _, f := range t.families {
			for i := range min(probes, t.services) {
				n := (i + 1) * t.services / min(probes, t.services)
				if err := t.answers(ctx, netip.AddrPortFrom(t.clusterIP(f, n), 80)); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// answers waits until an address answers the host on whose thread it runs.
func (t *trial) answers(ctx context.Context, at netip.AddrPort) error {
	dialer := net.Dialer{Timeout: 100 * time.Millisecond}
	for {
		c, err := dialer.DialContext(ctx, "tcp", at.String())
		if err == nil {
			return c.Close()
		}
		if ended := t.alive(ctx); ended != nil {
			return fmt.Errorf("%s does not answer: %w", at, ended)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// alive says why it is of no use to wait longer.
func (t *trial) alive(ctx context.Context) error {
	if err := t.process.Ended(); err != nil {
		return err
	}
	return ctx.Err()
}

func (t *trial) rest(ctx context.Context) error {
	if !wait.For(ctx, t.times.tidy) {
		return ctx.Err()
	}
	before, err := measure.UsageOf(t.process.Pid())
	if err != nil {
		return err
	}
	if !wait.For(ctx, t.times.rest) {
		return ctx.Err()
	}
	after, err := measure.UsageOf(t.process.Pid())
	t.figures["rest_cpu"] = (after.Processor - before.Processor).Seconds() * time.Minute.Seconds() / t.times.rest.Seconds()
	t.figures["memory_settled"] = after.Resident
	if err == nil && t.memory != nil {
		t.figures["memory_kernel"], err = t.memory.Kernel()
	}
	return err
}

// moveOnce moves the endpoint, and returns how long the old one answered from the
// beginning of the API write.
func (t *trial) moveOnce(ctx context.Context, f plan.Family) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, moveTimeout)
	defer cancel()
	t.at[f] = 1 - t.at[f]
	began := time.Now()
	if err := t.objects.move(ctx, f, t.bed.Lab.Host(movingPods[t.at[f]]).Addr.Of(f)); err != nil {
		return 0, err
	}
	return time.Since(began) + t.awaitMove(ctx, f), t.alive(ctx)
}

func (t *trial) awaitMove(ctx context.Context, f plan.Family) time.Duration {
	began := time.Now()
	target := netip.AddrPortFrom(t.clusterIP(f, t.services), 80)
	for ctx.Err() == nil {
		once, cancel := context.WithTimeout(ctx, time.Second)
		answer, err := t.bed.Lab.Host(clientPod).AskAndReset(once, "tcp", target)
		cancel()
		if err == nil && answer.Server == movingPods[t.at[f]] {
			break
		}
	}
	return time.Since(began)
}

// move moves the endpoint in each family in turn. A slow proxy gets fewer moves.
func (t *trial) move(ctx context.Context) error {
	var took []time.Duration
	var used time.Duration
	for began := time.Now(); len(took) < t.moves && (len(took) < leastMoves || time.Since(began) < movesTime); {
		if !wait.For(ctx, beforeMove) {
			return ctx.Err()
		}
		before, err := measure.UsageOf(t.process.Pid())
		if err != nil {
			return err
		}
		d, err := t.moveOnce(ctx, t.families[len(took)%len(t.families)])
		if err != nil {
			return err
		}
		if !wait.For(ctx, afterMove) {
			return ctx.Err()
		}
		after, err := measure.UsageOf(t.process.Pid())
		if err != nil {
			return err
		}
		took, used = append(took, d), used+after.Processor-before.Processor
		t.moved = append(t.moved, d.Seconds())
	}
	t.figures["move_p50"], t.figures["move_p99"] = measure.Quantile(took, 0.5).Seconds(), measure.Quantile(took, 0.99).Seconds()
	t.figures["move_cpu"] = used.Seconds() / float64(len(took))
	return nil
}

// storm changes endpoints at a steady rate, and moves one Service meanwhile.
func (t *trial) storm(ctx context.Context) error {
	before, err := measure.UsageOf(t.process.Pid())
	if err != nil {
		return err
	}
	received := t.bed.Received()
	storm, stop := context.WithTimeout(ctx, t.times.storm)
	defer stop()
	changed := make(chan error, 1)
	go func() { changed <- t.change(ctx, storm.Done()) }()
	var took []time.Duration
	for storm.Err() == nil {
		d, err := t.moveOnce(ctx, t.families[0])
		if err != nil {
			return err
		}
		took = append(took, d)
		wait.For(storm, 50*time.Millisecond+rand.N(100*time.Millisecond)) // not in step with the proxy's pauses
	}
	if err := <-changed; err != nil {
		return err
	}
	used, err := measure.Settle(ctx, t.process.Pid())
	t.figures["storm_cpu"] = (used.Processor - before.Processor).Seconds() / t.times.storm.Seconds()
	t.setReceived("storm_bytes", received, t.times.storm.Seconds())
	t.figures["storm_p50"], t.figures["storm_p99"] = measure.Quantile(took, 0.5).Seconds(), measure.Quantile(took, 0.99).Seconds()
	return err
}

// change changes endpoints at the rate of a storm until it is done.
func (t *trial) change(ctx context.Context, done <-chan struct{}) error {
	tick := time.NewTicker(time.Second / stormRate)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return nil
		case <-tick.C:
			if err := t.churn(ctx); err != nil {
				return err
			}
		}
	}
}

// setReceived sets what came from the API server since then, by a number of seconds. A
// directory has no such figure.
func (t *trial) setReceived(figure string, since int64, seconds float64) {
	if received := t.bed.Received(); received > 0 {
		t.figures[figure] = float64(received-since) / seconds
	}
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
	used, err := measure.Settle(ctx, t.process.Pid())
	t.figures["restart_cpu"] = used.Processor.Seconds()
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
	t.at[f] = 1 - t.at[f]
	if err := t.objects.move(ctx, f, t.bed.Lab.Host(movingPods[t.at[f]]).Addr.Of(f)); err != nil {
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
	used, err := measure.Settle(ctx, t.process.Pid())
	t.figures["changed_cpu"] = used.Processor.Seconds()
	return err
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
