package daemon

import (
	"errors"

	"signalbox/internal/handover"
	"signalbox/modes"
	"signalbox/proxier"
)

// dataplanes are the Proxiers at work. They outlive a change of the
// configuration that does not concern them: a relay would lose its connections
// otherwise, and a table would have to be read back from the kernel.
type dataplanes struct {
	// sockets are those that a service manager keeps for this process.
	sockets *handover.Sockets

	open map[planeKey]proxier.Proxier
	used map[planeKey]bool // by the configuration in force
	// serving says that every plane that is used was synced under the
	// configuration in force.
	serving bool
}

type planeKey struct {
	mode string
	opts proxier.Options
}

func newDataplanes() *dataplanes {
	return &dataplanes{sockets: handover.FromEnvironment(), open: map[planeKey]proxier.Proxier{}}
}

// begin is called for each configuration before what it uses is asked for.
func (d *dataplanes) begin() { d.used, d.serving = map[planeKey]bool{}, false }

// get returns the Proxier of a mode, which may have been at work before.
func (d *dataplanes) get(mode modes.Mode, opts proxier.Options) (proxier.Proxier, error) {
	key := planeKey{mode.Name, opts}
	p := d.open[key]
	if p == nil {
		var err error
		if p, err = mode.New(opts); err != nil {
			return nil, err
		}
		d.open[key] = p
	}
	d.used[key] = true
	return p, nil
}

// onceServing returns what counts first syncs. The planes of an earlier
// configuration, which packets go through until then, are closed after them,
// before told learns of the last one.
func (d *dataplanes) onceServing(families []proxier.Family, told func(proxier.SyncReport), failed func(error)) func(proxier.SyncReport) {
	waiting := map[proxier.Family]bool{}
	for _, f := range families {
		waiting[f] = true
	}
	return func(r proxier.SyncReport) {
		if r.Err == nil && !d.serving {
			delete(waiting, r.Family)
			if d.serving = len(waiting) == 0; d.serving {
				if err := d.closeOthers(); err != nil {
					failed(err)
				}
			}
		}
		told(r)
	}
}

func (d *dataplanes) closeOthers() error {
	var failed []error
	for key, p := range d.open {
		if !d.used[key] {
			if d.used != nil {
				standBy(p) // no process is to go on with its sockets
			}
			failed = append(failed, p.Close())
			delete(d.open, key)
		}
	}
	return errors.Join(failed...)
}

// standBy has all of them leave what comes to this process to the one that
// serves the node now.
func (d *dataplanes) standBy() {
	for _, p := range d.open {
		standBy(p)
	}
}

// standBy is for Proxiers that serve by themselves and not by rules alone.
func standBy(p proxier.Proxier) {
	if p, ok := p.(interface{ StandBy() }); ok {
		p.StandBy()
	}
}

// close lets go of all of them. Rules stay in the kernel.
func (d *dataplanes) close() error {
	d.used = nil
	return d.closeOthers()
}
