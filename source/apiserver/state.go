// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/cache"

	"signalbox/internal/wait"
	"signalbox/proxier/service"
	"signalbox/source/saved"
)

// savePeriod is the least time between two writes of a file.
const savePeriod = time.Second

// known is an object that the sink has.
type known struct {
	hash  uint64
	place saved.Place // in the state file
}

// state is the file with the latest objects of one kind. The resource's lock guards it.
type state struct {
	file  *saved.File // nil: nothing is saved
	path  string
	timer *time.Timer // nil while nothing waits to be written
	log   *slog.Logger
}

// openState makes the resource save its objects in a directory.
func (r *resource) openState(dir string) {
	if dir == "" {
		return
	}
	path := filepath.Join(dir, r.name+".state")
	r.state = state{path: path, log: r.log.With("file", path)}
	var err error
	if r.state.file, err = saved.Create(path); err != nil {
		r.state.log.Error("the state of the cluster cannot be saved; after a reboot without the API server, this node serves nothing or an older state", "error", err)
	}
}

// put saves an object and returns its place.
func (r *resource) put(name cache.ObjectName, text []byte) saved.Place {
	if r.state.file == nil {
		return 0
	}
	place, err := r.state.file.Put(name.String(), text)
	r.written(err)
	return place
}

// written arranges for the write, or stops saving after an error.
func (r *resource) written(err error) {
	if err != nil {
		r.state.fail(err)
		return
	}
	if r.state.timer == nil && r.state.file.InPlace() {
		r.state.timer = time.AfterFunc(savePeriod, r.save)
	}
}

// fail stops saving. The file in place is an older state then.
func (s *state) fail(err error) {
	if errors.Is(err, saved.ErrReplaced) {
		s.log.Debug("this process no longer saves the state of the cluster", "reason", err)
	} else {
		s.log.Error("the state of the cluster cannot be saved any more; the file keeps an older one until the next start", "error", err)
	}
	_ = s.file.Close()
	s.file = nil
}

// commitState puts the file in place, because it has all objects now.
func (r *resource) commitState() {
	if r.state.file == nil || r.state.file.InPlace() {
		return
	}
	if err := r.state.file.Commit(); err != nil {
		r.state.fail(err)
		return
	}
	r.state.file.Leftovers()
}

// save writes what waits.
func (r *resource) save() {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.state
	s.timer = nil
	if s.file == nil {
		return
	}
	err := s.file.Flush()
	if err == nil && s.file.Wasteful(len(r.sent)) {
		var next *saved.File
		if next, err = s.file.Rewrite(r.keepLatest); next != nil {
			s.file = next
		}
	}
	if err != nil {
		s.fail(err)
	}
}

// keepLatest calls keep for the record of each object.
func (r *resource) keepLatest(keep func(string, saved.Place) (saved.Place, error)) error {
	for name, k := range r.sent {
		var err error
		if k.place, err = keep(name.String(), k.place); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		r.sent[name] = k
	}
	return nil
}

// closeState writes what waits.
func (r *resource) closeState() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state.file == nil {
		return
	}
	if r.state.timer != nil {
		r.state.timer.Stop()
	}
	if err := r.state.file.Close(); err != nil {
		r.state.log.Error("the state of the cluster could not be saved at the end", "error", err)
	}
	r.state.file = nil
}

// serveSaved gives the sink the saved objects, unless the API server has listed them
// meanwhile. It returns when the file was written, and whether the sink has objects.
func (r *resource) serveSaved() (written time.Time, served bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if wait.Closed(r.listed) {
		return written, true
	}
	objects, written, err := saved.Load(r.state.path)
	if err != nil {
		r.state.log.Warn("there is no saved state to serve", "resource", r.name, "error", err)
		return written, false
	}
	for name, text := range objects {
		o := r.example.DeepCopyObject().(object)
		if err := o.(interface{ Unmarshal([]byte) error }).Unmarshal(text); err != nil {
			r.state.log.Warn("a saved object cannot be read", "resource", r.name, "object", name, "error", err)
			continue
		}
		_ = r.apply(o) // fails for an object of another kind alone
	}
	return written, len(r.sent) > 0
}

// serveSaved serves the saved objects if the API server does not list Services and
// EndpointSlices in time. It returns when they are listed, or ctx ends.
func (s *Source) serveSaved(ctx context.Context, sink service.Sink, services, slices, node, cidrs *resource) {
	inTime, cancel := context.WithTimeout(ctx, s.staleAfter)
	defer cancel()
	if s.StateDir == "" || allClosed(inTime, services.listed, slices.listed) || ctx.Err() != nil {
		return
	}
	node.serveSaved()
	cidrs.serveSaved()
	written, hasSlices := slices.serveSaved()
	other, hasServices := services.serveSaved()
	if !hasServices || !hasSlices {
		return // Services without their endpoints would be refused
	}
	if other.After(written) {
		written = other
	}
	s.log.Warn("the API server does not answer; this node serves the saved state of the cluster",
		"lastChange", written.Format(time.RFC3339), "age", time.Since(written).Round(time.Second))
	s.stale(written)
	sink.Synced()
	if allClosed(ctx, services.listed, slices.listed) {
		s.log.Info("the API server answers; the saved state is no longer in use")
		s.stale(time.Time{})
	}
}

func (s *Source) stale(since time.Time) {
	if s.OnStale != nil {
		s.OnStale(since)
	}
}
