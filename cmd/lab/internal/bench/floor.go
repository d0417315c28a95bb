package bench

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/cmd/lab/internal/measure"
	"signalbox/internal/netlab"
	"signalbox/nft"
	"signalbox/proxier/plan"
)

// floors measures what no proxy can avoid: to list and decode the objects, to give the
// kernel as many elements in one transaction, and to hear of a change from the API server.
func floors(ctx context.Context, o *objects, figures map[string][]float64) error {
	add := func(name string, v float64) { figures[name] = append(figures[name], v) }
	listed, err := timed(func() error { return o.listAll(ctx) })
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	written, err := o.writeElements()
	if err != nil {
		return fmt.Errorf("elements: %w", err)
	}
	add("list_wall", listed.wall)
	add("elements_wall", written.wall)
	add("cold_wall", listed.wall+written.wall)
	add("cold_cpu", listed.processor+written.processor)
	add("restart_wall", listed.wall)
	add("restart_cpu", listed.processor)
	heard, err := o.watchLatency(ctx)
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	add("move_p50", heard.Seconds())
	return nil
}

type cost struct{ wall, processor float64 }

// timed measures this process. Nothing else runs in it meanwhile.
func timed(do func() error) (cost, error) {
	before, began := processorTime(), time.Now()
	err := do()
	return cost{time.Since(began).Seconds(), processorTime() - before}, err
}

func processorTime() float64 {
	var use unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &use) // fails only for a bad pointer
	return float64(use.Utime.Nano()+use.Stime.Nano()) / 1e9
}

// writeElements writes one element for each Service and each endpoint, into a map of a
// network namespace without anything else.
func (o *objects) writeElements() (c cost, err error) {
	lab, err := netlab.Lone("floor")
	if err != nil {
		return c, err
	}
	defer lab.Close()
	err = lab.Host("floor").Do(func() error {
		for _, f := range o.families {
			took, err := writeElements(f, o.services*(o.perSlice+1))
			if err != nil {
				return err
			}
			c.wall, c.processor = c.wall+took.wall, c.processor+took.processor
		}
		return nil
	})
	return c, err
}

func writeElements(f plan.Family, n int) (cost, error) {
	family := nft.FamilyOf(f)
	table, err := nft.Open(family, "floor", []*nft.Set{{
		Name: "endpoints", Key: []nft.Field{nft.ClassIDField, nft.MarkField}, Data: []nft.Field{nft.AddrField, nft.PortField},
	}})
	if err != nil {
		return cost{}, err
	}
	defer table.Close()
	return timed(func() error {
		table.ReplaceTable()
		batch := make([]nft.Element, 0, nft.BatchElements)
		for i := range n {
			addr := netlab.Nth(endpointRanges[f], i+1)
			batch = append(batch, nft.Element{
				Key:  nft.MarkKey(uint32(i/16)) + nft.MarkKey(uint32(i%16)),
				Data: string(addr.AsSlice()) + string([]byte{bulkPort >> 8, bulkPort & 0xff, 0, 0}),
			})
			if len(batch) == cap(batch) || i == n-1 {
				table.AddElements(batch)
				batch = batch[:0]
			}
		}
		return table.Commit()
	})
}

// watchLatency is the median time from the beginning of a write until a watch tells it.
func (o *objects) watchLatency(ctx context.Context) (time.Duration, error) {
	const writes = 30
	f := o.families[0]
	w, err := o.client.DiscoveryV1().EndpointSlices(namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector:   "metadata.name=" + o.moving[f].Name,
		ResourceVersion: o.moving[f].ResourceVersion,
	})
	if err != nil {
		return 0, err
	}
	defer w.Stop()
	var took []time.Duration
	for i := range writes {
		began := time.Now()
		if err := o.move(ctx, f, netlab.Nth(endpointRanges[f], i+1)); err != nil {
			return 0, err
		}
		if _, open := <-w.ResultChan(); !open {
			return 0, fmt.Errorf("the watch ended")
		}
		took = append(took, time.Since(began))
	}
	return measure.Median(took), nil
}
