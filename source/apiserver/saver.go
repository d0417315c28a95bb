// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"sync"
	"time"

	"k8s.io/client-go/tools/cache"

	"signalbox/internal/wait"
	"signalbox/source/saved"
)

const (
	// savePeriod is the least time between two writes of a file that is in place.
	savePeriod = time.Second
	// gatherPeriod is the same for a new file, which gets all objects at once.
	gatherPeriod = 10 * time.Millisecond
	// maxSavePause is the longest pause after writes that failed.
	maxSavePause = time.Minute
	// fullPause is the pause after a state that is larger than a file may be. A further try
	// reads and writes all of it.
	fullPause = 10 * time.Minute
	// stuckAfter is how long a write may take before it counts as failed.
	stuckAfter = 30 * time.Second
)

var errStuck = errors.New("the disk does not answer")

// saver writes the latest objects of one kind to a file. A disk may fail or stall, so one
// goroutine does all that needs it. What waits for the disk stays in memory: at most one
// form of each object.
type saver struct {
	path   string
	owns   func() bool // see Source.OwnsState
	report func(error) // called with the outcome of each write
	create func(path string) (*saved.File, error)

	file  *saved.File   // nil until it could be created; the goroutine's own
	wake  chan struct{} // has a token while there is something to do
	ended chan struct{} // closed when the goroutine has ended

	mu       sync.Mutex // guards what follows
	pending  map[cache.ObjectName]change
	objects  int  // how many exist
	complete bool // these are all that the API server has
	closed   bool // nothing is written any more
}

// change is the latest form of an object.
type change struct {
	text    []byte // nil: the object is gone
	created bool   // the file says nothing of the object
}

func newSaver(path string, owns func() bool, report func(error)) *saver {
	return &saver{
		path: path, owns: owns, report: report, create: saved.Create,
		wake: make(chan struct{}, 1), ended: make(chan struct{}), pending: map[cache.ObjectName]change{},
	}
}

// put has the form of an object written, and nil if the object is gone. created says that
// the object did not exist before. A nil saver saves nothing.
func (s *saver) put(name cache.ObjectName, text []byte, created bool) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	switch {
	case text == nil:
		s.objects--
	case created:
		s.objects++
	}
	s.merge(name, change{bytes.Clone(text), created})
	wait.Wake(s.wake)
}

// merge adds a change to those that wait. The lock is held.
func (s *saver) merge(name cache.ObjectName, c change) {
	if earlier, ok := s.pending[name]; ok {
		c.created = earlier.created
	}
	s.pending[name] = c
	if c.text == nil && c.created {
		delete(s.pending, name)
	}
}

// listed says that the API server has no other objects.
func (s *saver) listed() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.complete = true
	wait.Wake(s.wake)
}

// run writes until ctx ends, and then once more.
func (s *saver) run(ctx context.Context) {
	defer s.close()
	var failing time.Duration // the last pause after a failure
	for last := false; !last; {
		select {
		case <-s.wake:
		case <-ctx.Done():
			last = true
		}
		stuck := time.AfterFunc(stuckAfter, func() { s.report(errStuck) })
		pause, err := s.write()
		stuck.Stop()
		s.report(err)
		switch {
		case err == nil:
			failing = 0
		case errors.Is(err, saved.ErrFull):
			pause = fullPause
			wait.Wake(s.wake)
		default:
			failing = min(max(2*failing, savePeriod), maxSavePause)
			pause = failing
			wait.Wake(s.wake)
		}
		wait.For(ctx, pause)
	}
}

// write brings the file up to date, and in place if it has all objects. It returns how long
// the next write must wait.
func (s *saver) write() (pause time.Duration, err error) {
	if s.file == nil {
		if s.file, err = s.create(s.path); err != nil {
			return 0, err
		}
	}
	batch, objects, complete := s.take()
	if err := s.store(batch, objects); err != nil {
		return 0, err
	}
	switch {
	case !complete:
		return gatherPeriod, nil
	case !s.file.InPlace() && s.owns():
		return savePeriod, s.file.Commit()
	case !s.file.InPlace():
		wait.Wake(s.wake) // to ask again
	}
	return savePeriod, nil
}

// store writes changes to the file, or to a new file if this one is full, is lost or has
// mostly out-of-date records. Changes that no file has are pending again after an error.
func (s *saver) store(batch map[cache.ObjectName]change, objects int) error {
	err := s.file.Append(texts(batch))
	if err == nil {
		batch = nil
		if !s.file.Lost() && !s.file.Wasteful(objects) {
			return nil
		}
	}
	if err == nil || errors.Is(err, saved.ErrFull) {
		var next *saved.File
		if next, err = s.file.Compact(texts(batch)); err == nil {
			s.file = next
			return nil
		}
	}
	s.requeue(batch)
	return err
}

// texts returns the forms of the objects in a batch by name.
func texts(batch map[cache.ObjectName]change) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		for name, c := range batch {
			if !yield(name.String(), c.text) {
				return
			}
		}
	}
}

// take removes the pending changes and returns them.
func (s *saver) take() (batch map[cache.ObjectName]change, objects int, complete bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	batch = s.pending
	s.pending = map[cache.ObjectName]change{}
	return batch, s.objects, s.complete
}

// requeue makes changes pending again. Changes that came later win.
func (s *saver) requeue(batch map[cache.ObjectName]change) {
	if len(batch) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	later := s.pending
	s.pending = batch
	for name, c := range later {
		s.merge(name, c)
	}
}

func (s *saver) close() {
	s.mu.Lock()
	s.closed, s.pending = true, nil
	s.mu.Unlock()
	if s.file != nil {
		_ = s.file.Close() // nothing waits to be written
	}
	close(s.ended)
}
