// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"signalbox/internal/wait"
	"signalbox/proxier/service"
	"signalbox/source/saved"
)

// diskTimeout bounds how long the start and the end of a Source wait for the disk.
const diskTimeout = 3 * time.Second

// startSaving has the objects of resources saved until ctx ends. It returns a function that
// waits for the last write then.
func (s *Source) startSaving(ctx context.Context, resources []*resource) (await func()) {
	if s.StateDir == "" {
		return func() {}
	}
	var ended []<-chan struct{}
	for _, r := range resources {
		r.path = filepath.Join(s.StateDir, r.name+".state")
		r.saver = newSaver(r.path, s.ownsState, func(err error) {
			if ctx.Err() == nil {
				s.reportSaving(r.path, err)
			}
		})
		ended = append(ended, r.saver.ended)
		go r.saver.run(ctx)
	}
	return func() {
		waiting, cancel := context.WithTimeout(context.Background(), diskTimeout)
		defer cancel()
		if !allClosed(waiting, ended...) {
			s.log.Error("the last changes of the cluster could not be saved", "error", errStuck)
		}
	}
}

func (s *Source) ownsState() bool { return s.OwnsState == nil || s.OwnsState() }

// reportSaving reports how a write of a file ended.
func (s *Source) reportSaving(path string, err error) {
	s.unsavedLock.Lock()
	defer s.unsavedLock.Unlock()
	_, failing := s.unsaved[path]
	switch {
	case err == nil && !failing:
		return
	case err == nil:
		delete(s.unsaved, path)
		s.log.Info("the state of the cluster is saved again", "file", path)
	default:
		s.unsaved[path] = err
	}
	if err != nil && !failing {
		s.log.Error("the state of the cluster cannot be saved, and signalbox tries again; a reboot without the API server would find an older state", "file", path, "error", err)
	}
	if s.OnUnsaved == nil {
		return
	}
	var problems []string
	for _, path := range slices.Sorted(maps.Keys(s.unsaved)) {
		problems = append(problems, fmt.Sprintf("the state of the cluster cannot be saved in %s: %v", path, s.unsaved[path]))
	}
	s.OnUnsaved(problems)
}

// savedObjects is what a file says.
type savedObjects struct {
	texts   map[string][]byte
	written time.Time
	err     error
}

// readSaved reads the file of an earlier process.
func (r *resource) readSaved() savedObjects {
	read := make(chan savedObjects, 1)
	go func() {
		texts, written, err := saved.Load(r.path)
		read <- savedObjects{texts, written, err}
	}()
	select {
	case s := <-read:
		return s
	case <-time.After(diskTimeout):
		return savedObjects{err: errStuck}
	}
}

// readEarlier sets how many objects were known earlier, if that is not known yet.
func (r *resource) readEarlier() {
	if r.earlier > 0 || r.path == "" {
		return
	}
	found := r.readSaved()
	delete(found.texts, ofAPIServer.String())
	r.earlier = len(found.texts)
	if found.err != nil && !errors.Is(found.err, fs.ErrNotExist) {
		r.earlier = 1 // at least, for all that is known
	}
}

// serveSaved gives the sink saved objects, unless the API server has listed them meanwhile.
// It returns whether the sink has objects.
func (r *resource) serveSaved(found savedObjects) (served bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if wait.Closed(r.listed) {
		return true
	}
	if found.err != nil {
		r.log.Warn("there is no saved state to serve", "resource", r.name, "file", r.path, "error", found.err)
	}
	for name, text := range found.texts {
		o := r.example.DeepCopyObject().(object)
		if err := o.(interface{ Unmarshal([]byte) error }).Unmarshal(text); err != nil {
			r.log.Warn("a saved object cannot be read", "resource", r.name, "file", r.path, "object", name, "error", err)
			continue
		}
		_ = r.apply(o) // fails for an object of another kind alone
	}
	return len(r.sent) > 0
}

// serveSaved serves the saved objects if the API server does not list Services and
// EndpointSlices in time. It returns when they are listed, or ctx ends.
func (s *Source) serveSaved(ctx context.Context, sink service.Sink, services, endpoints, node, cidrs *resource) {
	inTime, cancel := context.WithTimeout(ctx, s.staleAfter)
	defer cancel()
	if s.StateDir == "" || allClosed(inTime, services.listed, endpoints.listed) || ctx.Err() != nil {
		return
	}
	order := []*resource{node, cidrs, endpoints, services}
	found := make([]savedObjects, len(order))
	var reads sync.WaitGroup
	for i, r := range order {
		reads.Go(func() { found[i] = r.readSaved() })
	}
	reads.Wait()
	served := map[*resource]bool{}
	var written time.Time // the latest
	for i, r := range order {
		served[r] = r.serveSaved(found[i])
		if found[i].written.After(written) {
			written = found[i].written
		}
	}
	if !served[services] || !served[endpoints] {
		return // Services without their endpoints would be refused
	}
	if wait.Closed(services.listed) && wait.Closed(endpoints.listed) {
		return // meanwhile
	}
	s.log.Warn("the API server does not answer, or lists no objects; this node serves the saved state of the cluster",
		"lastChange", written.Format(time.RFC3339), "age", time.Since(written).Round(time.Second))
	s.stale(written)
	sink.Synced()
	if allClosed(ctx, services.listed, endpoints.listed) {
		s.log.Info("the API server has listed its objects; the saved state is no longer in use")
		s.stale(time.Time{})
	}
}

func (s *Source) stale(since time.Time) {
	if s.OnStale != nil {
		s.OnStale(since)
	}
}
