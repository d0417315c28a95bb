// SPDX-License-Identifier: Apache-2.0

package file

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/proxier/service"
)

const (
	// largeFile is the size in bytes above which a goroutine reads the file: 5 MB
	// of YAML take about a second.
	largeFile = 1 << 20
	// maxFaults is how many faults of a file are logged.
	maxFaults = 20
)

var (
	errReplaced     = errors.New("another directory is at the path")
	errNotWatched   = errors.New("no events of the directory come")
	errBeingWritten = errors.New("being written")
	errNotAFile     = errors.New("not a regular file")
)

func (s *Source) readAll(ctx context.Context, sink service.Sink) (unfinished map[string]bool, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", s.dir, err)
	}
	names := map[string]bool{}
	for _, e := range entries {
		if isManifest(e.Name()) {
			names[e.Name()] = true
		}
	}
	if len(names) == 0 && s.inGrace() {
		return nil, nil
	}
	s.emptySince = time.Time{}
	for name := range s.fingerprints {
		names[name] = true // also files that are gone
	}
	return s.readSome(ctx, names, sink, false), nil
}

// inGrace says whether the objects of a directory without manifests still stay.
func (s *Source) inGrace() bool {
	if len(s.catalog.files) == 0 {
		return false // there are no objects
	}
	if s.emptySince.IsZero() {
		s.emptySince = time.Now()
		s.log.Warn("the directory has no manifest any more; its objects stay until the grace period ends", "gracePeriod", s.grace)
	}
	if time.Since(s.emptySince) < s.grace {
		return true
	}
	s.log.Warn("the directory has had no manifest for the grace period; its objects are removed", "gracePeriod", s.grace)
	return false
}

// readSome reads the named files. It returns all of the names if one of the files
// is unfinished: a program writes to it, or it is new and has faults.
func (s *Source) readSome(ctx context.Context, names map[string]bool, sink service.Sink, newFiles bool) (unfinished map[string]bool) {
	changed := s.unsent
	objects := map[string]map[key]manifest{}
	for name := range names {
		some, ok := s.readOne(ctx, name, newFiles, objects)
		if !ok {
			unfinished = names
		}
		changed = append(changed, some...)
	}
	load := func(name string, k key) object {
		if _, ok := objects[name]; !ok {
			// The file is unchanged. It had the object too, and is its first holder now.
			content, err := os.ReadFile(filepath.Join(s.dir, name))
			if err != nil {
				s.unread[name] = true
				return nil
			}
			objects[name] = parse(content).objects
		}
		return objects[name][k].object
	}
	s.unsent = s.catalog.send(changed, load, sink)
	return unfinished
}

// readOne reads a file if it has changed. It puts the file's objects into objects
// and returns the keys of those that changed. ok is false if the file is
// unfinished.
func (s *Source) readOne(ctx context.Context, name string, isNew bool, objects map[string]map[key]manifest) (changed []key, ok bool) {
	f, info, err := s.open(name)
	var r reading
	switch {
	case errors.Is(err, errBeingWritten):
		return nil, false
	case err != nil:
		delete(s.large, name)
		if errors.Is(err, fs.ErrNotExist) {
			delete(s.fingerprints, name)
			delete(s.problems, name)
			delete(s.unread, name)
			return s.catalog.set(name, nil, false), true
		}
		r.err = err
	case info.Size() > largeFile || s.isLarge(name):
		return s.readLarge(ctx, name, f, info, objects), true
	default:
		defer f.Close()
		r = read(f, s.fingerprints[name])
	}
	if isNew && r.err == nil && !r.unchanged && (len(r.faults) > 0 || len(r.objects) == 0) {
		return nil, false
	}
	return s.accept(name, &r, objects), true
}

// reading is the result of reading a file.
type reading struct {
	// name and info of a large file, before it was read.
	name string
	info fs.FileInfo

	err         error
	fingerprint uint64
	unchanged   bool // since it was last read
	objects     map[key]manifest
	faults      []fault
}

// read parses a file unless it still has the last fingerprint.
func read(f io.Reader, last uint64) reading {
	content, err := io.ReadAll(f)
	r := reading{err: err, fingerprint: maphash.Bytes(seed, content)}
	r.unchanged = r.fingerprint == last
	if err == nil && !r.unchanged && (len(content) <= largeFile || namesKind(content)) {
		p := parse(content)
		r.objects, r.faults = p.objects, p.faults
	}
	return r
}

// namesKind says whether a text can have an object of the kinds that are read.
// Large files of other content are not parsed.
func namesKind(text []byte) bool {
	for kind := range kinds {
		if bytes.Contains(text, []byte(kind)) {
			return true
		}
	}
	return false
}

func (s *Source) isLarge(name string) bool {
	_, ok := s.large[name]
	return ok
}

// readLarge accepts what a goroutine has read of a large file. If the file has
// changed since, or was not read yet, it starts such a goroutine. It closes f.
func (s *Source) readLarge(ctx context.Context, name string, f *os.File, now fs.FileInfo, objects map[string]map[key]manifest) (changed []key) {
	if s.isLarge(name) {
		r := s.large[name]
		if r == nil {
			f.Close()
			return nil // the file comes here again when the goroutine has read it
		}
		delete(s.large, name)
		if os.SameFile(r.info, now) && r.info.Size() == now.Size() && r.info.ModTime().Equal(now.ModTime()) {
			f.Close()
			return s.accept(name, r, objects)
		}
	}
	s.large[name] = nil
	last := s.fingerprints[name]
	go func() {
		defer f.Close()
		r := read(f, last)
		r.name, r.info = name, now
		select {
		case s.largeRead <- &r:
		case <-ctx.Done():
		}
	}()
	return nil
}

// accept takes over the content of a file and returns the keys of the objects
// that changed.
func (s *Source) accept(name string, r *reading, objects map[string]map[key]manifest) (changed []key) {
	if r.err != nil {
		s.unread[name] = true
		s.fingerprints[name] = 0 // so that its faults are found again
		if reason := r.err.Error(); s.problems[name] != reason {
			s.problems[name] = reason // it names the file
			s.log.Warn("a file cannot be read; its earlier objects stay, and the source tries again", "every", pollPeriod, "error", r.err)
		}
		return nil
	}
	delete(s.unread, name)
	if r.unchanged {
		return nil
	}
	s.fingerprints[name] = r.fingerprint
	s.logFaults(name, r.faults)
	objects[name] = r.objects
	return s.catalog.set(name, r.objects, slices.ContainsFunc(r.faults, fault.serious))
}

// logFaults logs what is wrong with a file, and keeps the first serious fault
// for reportProblems.
func (s *Source) logFaults(name string, faults []fault) {
	delete(s.problems, name)
	at := func(f fault) string { return filepath.Join(s.dir, name) + ": " + f.place }
	if i := slices.IndexFunc(faults, fault.serious); i >= 0 {
		s.problems[name] = at(faults[i]) + ": " + faults[i].reason
	}
	for _, f := range faults[:min(len(faults), maxFaults)] {
		if f.harmless {
			s.log.Warn("an object is ignored", "at", at(f), "reason", f.reason)
		} else {
			s.log.Error("a manifest has a fault; its earlier objects stay", "at", at(f), "reason", f.reason)
		}
	}
	if len(faults) > maxFaults {
		s.log.Error("a file has more faults than are logged", "file", filepath.Join(s.dir, name), "faults", len(faults))
	}
}

// reportProblems calls OnProblems if the problems have changed.
func (s *Source) reportProblems() {
	problems := slices.Sorted(maps.Values(s.problems))
	if !s.emptySince.IsZero() {
		problems = append(problems, fmt.Sprintf("%s has no manifest any more; its objects stay until %s",
			s.dir, s.emptySince.Add(s.grace).Format(time.RFC3339)))
	}
	if s.OnProblems != nil && !slices.Equal(problems, s.reported) {
		s.reported = problems
		s.OnProblems(problems)
	}
}

// open opens a file, unless a program writes to it.
func (s *Source) open(name string) (*os.File, fs.FileInfo, error) {
	// O_NONBLOCK: a pipe must not block.
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s: %w", f.Name(), errNotAFile)
	case s.waitForWriter(name, f):
		err = errBeingWritten
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}
