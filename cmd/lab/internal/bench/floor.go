// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/internal/measure"
	"signalbox/internal/netlab"
	"signalbox/internal/xtables"
	"signalbox/nft"
	"signalbox/proxier/plan"
)

// floor is what no proxy can avoid: to list and decode the objects, to give the kernel as
// many elements in one transaction, and to hear of a change. With a directory, only the
// elements count.
type floor struct {
	listed, written cost
	heard           float64 // seconds
}

func measureFloor(ctx context.Context, o *objects) (f floor, err error) {
	if f.written, err = o.writeElements(); err != nil {
		return f, fmt.Errorf("elements: %w", err)
	}
	if o.client == nil {
		return f, nil
	}
	if f.listed, err = timed(func() error { return o.listAll(ctx) }); err != nil {
		return f, fmt.Errorf("list: %w", err)
	}
	heard, err := o.watchLatency(ctx)
	if err != nil {
		return f, fmt.Errorf("watch: %w", err)
	}
	f.heard = heard.Seconds()
	return f, nil
}

// figures are the floors by the names of the figures that cannot go below them.
func (f floor) figures() map[string]float64 {
	figures := map[string]float64{
		"cold_wall": f.listed.wall + f.written.wall, "cold_cpu": f.listed.processor + f.written.processor,
	}
	if f.heard > 0 {
		figures["restart_wall"], figures["restart_cpu"], figures["move_p50"] = f.listed.wall, f.listed.processor, f.heard
	}
	return figures
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
				Data: string(addr.AsSlice()) + string([]byte{othersPort >> 8, othersPort & 0xff, 0, 0}),
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
			return 0, errors.New("the watch ended")
		}
		took = append(took, time.Since(began))
	}
	return measure.Median(took), nil
}

// counterMatch is a match that counts packets in an object of nfnetlink_acct.
var counterMatch = regexp.MustCompile(` -m nfacct --nfacct-name +\S+`)

// toolsFloor measures what this proxy cannot avoid with the legacy iptables tools: to write
// all of its own rules, and to change one chain beside them. The kernel replaces the whole
// table for each change.
func (t *trial) toolsFloor(ctx context.Context) error {
	lab, err := netlab.Lone("floor")
	if err != nil {
		return err
	}
	defer lab.Close()
	var restored, changed cost
	for _, f := range t.families {
		tools, err := xtables.Find(f, xtables.Legacy)
		if err != nil {
			return err
		}
		saved, _, err := t.runTool(ctx, t.bed.Lab.Host("node1"), "", tools.Save)
		if err != nil {
			return err
		}
		// kube-proxy's counters exist on its own node only.
		saved = counterMatch.ReplaceAllString(saved, "")
		_, took, err := t.runTool(ctx, lab.Host("floor"), saved, tools.Restore)
		if err != nil {
			return err
		}
		restored = restored.plus(took)
		_, took, err = t.runTool(ctx, lab.Host("floor"), "*nat\n:FLOOR - [0:0]\nCOMMIT\n", tools.Restore, "--noflush")
		if err != nil {
			return err
		}
		changed = changed.plus(took)
	}
	moved := float64(len(t.families)) // a move changes one family
	t.floors["cold_wall"], t.floors["cold_cpu"] = t.floor.listed.wall+restored.wall, t.floor.listed.processor+restored.processor
	t.floors["move_p50"], t.floors["move_cpu"] = t.floor.heard+changed.wall/moved, changed.processor/moved
	return nil
}

func (c cost) plus(d cost) cost { return cost{c.wall + d.wall, c.processor + d.processor} }

// runTool runs a program on a host, and returns its output.
func (t *trial) runTool(ctx context.Context, host *netlab.Host, in, path string, args ...string) (string, cost, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	var out, said strings.Builder
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = t.bed.Env(), strings.NewReader(in), &out, &said
	began := time.Now()
	if err := host.Start(cmd); err != nil {
		return "", cost{}, err
	}
	if err := cmd.Wait(); err != nil {
		return "", cost{}, fmt.Errorf("%s: %w: %s", path, err, said.String())
	}
	used := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return out.String(), cost{time.Since(began).Seconds(), used.Seconds()}, nil
}
