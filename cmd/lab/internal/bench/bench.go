package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"signalbox/cmd/lab/internal/measure"
	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
	"signalbox/proxier/plan"
)

// Config says what is measured.
type Config struct {
	Proxies  []testbed.Proxy
	Sizes    []Size
	Families []plan.Family
	// Rounds is how often each proxy is measured at each size.
	Rounds int
	// Moves is how often an endpoint moves at rest in one round.
	Moves int
	// Log gets a line for each step.
	Log func(format string, args ...any)
}

// MaxServices is how many cluster IPs a lab has room for.
const MaxServices = 1<<16 - firstService - 2

// Size is a number of Services with that many endpoints each.
type Size struct {
	Services  int `json:"services"`
	Endpoints int `json:"endpointsPerService"`
}

func (s Size) String() string { return fmt.Sprintf("%d x %d", s.Services, s.Endpoints) }

// Run measures every proxy at every size. A proxy that fails has the error in its result,
// and the others go on.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	report := newReport(cfg)
	for _, size := range cfg.Sizes {
		result, err := runSize(ctx, cfg, size)
		if err != nil {
			return report, fmt.Errorf("%s: %w", size, err)
		}
		report.Sizes = append(report.Sizes, *result)
	}
	return report, nil
}

func runSize(ctx context.Context, cfg Config, size Size) (result *SizeResult, err error) {
	dir, err := cluster.MakeDir()
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	c, err := testbed.StartCluster(ctx, dir, cfg.Log)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	o, err := prepare(ctx, cfg, size, c, dir)
	if err != nil {
		return nil, err
	}
	result = &SizeResult{Size: size, Floors: map[string][]float64{}}
	for _, p := range cfg.Proxies {
		result.Proxies = append(result.Proxies, ProxyResult{Program: p.Program, Mode: p.Mode, Figures: map[string][]float64{}})
	}
	for round := range cfg.Rounds {
		cfg.Log("%s: round %d of %d", size, round+1, cfg.Rounds)
		if err := floors(ctx, o, result.Floors); err != nil {
			return nil, fmt.Errorf("floors: %w", err)
		}
		for i := range cfg.Proxies {
			at := (i + round) % len(cfg.Proxies) // each comes first once
			r := &result.Proxies[at]
			if r.Failed != "" {
				continue
			}
			figures, moves, err := runTrial(ctx, cfg, o, c, cfg.Proxies[at])
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil {
				cfg.Log("%v", err)
				r.Failed = err.Error()
				continue
			}
			r.add(figures)
			r.Moves = append(r.Moves, moves...)
		}
	}
	return result, nil
}

// prepare creates the objects of a size.
func prepare(ctx context.Context, cfg Config, size Size, c *cluster.Cluster, dir string) (*objects, error) {
	config, err := c.Config("bench", "system:masters")
	if err != nil {
		return nil, err
	}
	config.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	bed, err := testbed.New(c, netlab.Options{}, dir)
	if err != nil {
		return nil, err
	}
	defer bed.Close()
	if err := testbed.CreateNodes(ctx, c, bed.Lab, "node1", "node2"); err != nil {
		return nil, err
	}
	o := &objects{
		client: client, families: cfg.Families, services: size.Services, perSlice: size.Endpoints,
		slices: make(map[plan.Family][]*discoveryv1.EndpointSlice), moving: make(map[plan.Family]*discoveryv1.EndpointSlice),
		random: rand.New(rand.NewPCG(1, uint64(size.Services))),
	}
	cfg.Log("%s: creating the objects", size)
	return o, o.create(ctx, bed.Lab)
}

func runTrial(ctx context.Context, cfg Config, o *objects, c *cluster.Cluster, p testbed.Proxy) (figures map[string]float64, moves []float64, err error) {
	dir, err := os.MkdirTemp("", "signalbox-bench-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	bed, err := testbed.New(c, netlab.Options{}, dir)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, bed.Close()) }()
	t := &trial{objects: o, bed: bed, proxy: p, moves: cfg.Moves, figures: map[string]float64{}, log: cfg.Log}
	// Earlier trials left the moving endpoint anywhere.
	for _, f := range o.families {
		if err := o.move(ctx, f, bed.Lab.Host(movingPods[0]).Addr.Of(f)); err != nil {
			return nil, nil, err
		}
	}
	if err := t.plainConnect(ctx); err != nil {
		return nil, nil, err
	}
	err = t.run(ctx)
	return t.figures, t.moved, err
}

// plainConnect times connections to a Pod while the node has no rules.
func (t *trial) plainConnect(ctx context.Context) error {
	direct := netip.AddrPortFrom(t.bed.Lab.Host(movingPods[0]).Addr.Of(t.families[0]), movingPort)
	lat, err := connects(ctx, t.bed.Lab.Host(clientPod), direct, direct)
	t.figures["connect_plain"] = measure.Median(lat.Through).Seconds()
	return err
}

// listAll lists and decodes all Services and EndpointSlices, and throws them away.
func (o *objects) listAll(ctx context.Context) error {
	if _, err := o.client.CoreV1().Services(namespace).List(ctx, metav1.ListOptions{ResourceVersion: "0"}); err != nil {
		return err
	}
	_, err := o.client.DiscoveryV1().EndpointSlices(namespace).List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	return err
}

// Write writes the report: report.json, report.md and the charts.
func (r *Report) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := r.writeJSON(filepath.Join(dir, "report.json")); err != nil {
		return err
	}
	if err := r.writeCharts(dir); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "report.md"), []byte(r.markdown("")), 0o644)
}

// today is the date of a report.
func today() string { return time.Now().UTC().Format(time.DateOnly) }
