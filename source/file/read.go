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

	"signalbox/proxier"
)

// largeFile is the size in bytes from which a file is read by a goroutine of
// its own: YAML takes about a second for 5 MB.
const largeFile = 1 << 20

func (s *Source) readAll(ctx context.Context, sink proxier.Sink) (unsettled map[string]bool, err error) {
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
	if len(names) == 0 && s.waitsForManifests() {
		return nil, nil
	}
	s.emptied = time.Time{}
	for name := range s.content {
		names[name] = true // also those that are gone
	}
	return s.readSome(ctx, names, sink, false), nil
}

// waitsForManifests says whether the objects of a directory stay in which no
// manifest was found.
func (s *Source) waitsForManifests() bool {
	if len(s.catalog.files) == 0 {
		return false // nothing can be lost
	}
	if s.emptied.IsZero() {
		s.emptied = time.Now()
		s.log.Warn("the directory has no manifest any more; its objects are served until the grace period ends", "gracePeriod", s.grace)
	}
	if time.Since(s.emptied) < s.grace {
		return true
	}
	s.log.Warn("the directory has had no manifest for the grace period; its objects are removed", "gracePeriod", s.grace)
	return false
}

// readSome reads the named files. It takes no notice of files that are being
// written and returns their names; a hasty reading does so with every file that
// has faults, which may only be half written.
func (s *Source) readSome(ctx context.Context, names map[string]bool, sink proxier.Sink, hasty bool) (unsettled map[string]bool) {
	var concerned []key
	fresh := map[string]map[key]manifest{}
	for name := range names {
		some, ok := s.readOne(ctx, name, hasty, fresh)
		if !ok {
			unsettled = names // together with those that they came with
			continue
		}
		concerned = append(concerned, some...)
	}
	fetch := func(name string, k key) object {
		if _, just := fresh[name]; !just {
			// The file became an object's first holder without having changed.
			if content, err := os.ReadFile(filepath.Join(s.dir, name)); err == nil {
				fresh[name], _ = read(content)
			}
		}
		return fresh[name][k].object
	}
	s.catalog.tell(concerned, fetch, sink)
	return unsettled
}

// readOne reads a file, if it has changed since it was last read, into fresh
// and returns the objects that this concerns.
func (s *Source) readOne(ctx context.Context, name string, hasty bool, fresh map[string]map[key]manifest) (concerned []key, ok bool) {
	f, info, err := s.open(name)
	var r reading
	switch {
	case errors.Is(err, errBeingWritten):
		return nil, false
	case err != nil:
		delete(s.large, name)
		if errors.Is(err, fs.ErrNotExist) {
			delete(s.content, name)
			delete(s.faulty, name)
			return s.catalog.set(name, nil, false), true
		}
		r.err = err
	case info.Size() > largeFile || s.large[name] != nil:
		return s.readLater(ctx, name, f, info, fresh), true
	default:
		r = readFrom(f, s.known(name))
		f.Close()
	}
	if hasty && r.err == nil && (len(r.faults) > 0 || r.empty) {
		return nil, false
	}
	return s.accept(name, r, fresh), true
}

// reading is what reading a file gave.
type reading struct {
	// Of a large file: its name, what it was before it was read, and whether it
	// was read.
	name string
	file fs.FileInfo
	done bool

	err         error
	empty       bool
	unchanged   bool // since it was last read
	fingerprint uint64
	found       map[key]manifest
	faults      []fault
}

// broken says whether objects of the file may be missing in found.
func (r *reading) broken() bool {
	return slices.ContainsFunc(r.faults, fault.serious)
}

// known returns the fingerprint of what a file held when it was last read; nil
// where it was not.
func (s *Source) known(name string) *uint64 {
	if fingerprint, read := s.content[name]; read {
		return &fingerprint
	}
	return nil
}

func readFrom(f io.Reader, known *uint64) (r reading) {
	content, err := io.ReadAll(f)
	if err != nil {
		return reading{err: err}
	}
	r = reading{empty: len(content) == 0, fingerprint: maphash.Bytes(seed, content)}
	r.unchanged = known != nil && *known == r.fingerprint
	if !r.unchanged && (len(content) <= largeFile || mentionsKind(content)) {
		r.found, r.faults = read(content)
	}
	return r
}

// mentionsKind says whether a text can hold an object that is served. It keeps
// a large file of something else from being parsed.
func mentionsKind(text []byte) bool {
	for kind := range kinds {
		if bytes.Contains(text, []byte(kind)) {
			return true
		}
	}
	return false
}

// readLater accepts what a goroutine has read of a large file, and has the file
// read if it has changed since. Other files do not wait for it. It closes f.
func (s *Source) readLater(ctx context.Context, name string, f *os.File, now fs.FileInfo, fresh map[string]map[key]manifest) (concerned []key) {
	if r := s.large[name]; r != nil {
		if !r.done {
			f.Close()
			return nil // it is looked at again when it was read
		}
		delete(s.large, name)
		if os.SameFile(r.file, now) && r.file.Size() == now.Size() && r.file.ModTime().Equal(now.ModTime()) {
			f.Close()
			return s.accept(name, *r, fresh)
		}
	}
	s.large[name] = &reading{}
	known := s.known(name)
	go func() {
		defer f.Close()
		got := readFrom(f, known)
		got.name, got.file, got.done = name, now, true
		select {
		case s.largeRead <- &got:
		case <-ctx.Done():
		}
	}()
	return nil
}

// accept takes over what was read of a file and returns the objects that this
// concerns.
func (s *Source) accept(name string, r reading, fresh map[string]map[key]manifest) (concerned []key) {
	if r.err != nil {
		s.faulty[name] = r.err.Error() // it names the file
		s.content[name] = 0            // so that its faults are found again
		s.log.Warn("a file cannot be read; what it held before goes on being served", "error", r.err)
		return nil
	}
	if r.unchanged {
		return nil
	}
	s.content[name] = r.fingerprint
	s.report(name, r)
	fresh[name] = r.found
	return s.catalog.set(name, r.found, r.broken())
}

// report logs what is wrong with a file, and remembers it for note.
func (s *Source) report(name string, r reading) {
	delete(s.faulty, name)
	path := filepath.Join(s.dir, name)
	at := func(f fault) string { return fmt.Sprintf("%s:%d", path, f.line) }
	if i := slices.IndexFunc(r.faults, fault.serious); i >= 0 {
		s.faulty[name] = at(r.faults[i]) + ": " + r.faults[i].reason
	}
	for i, f := range r.faults {
		switch {
		case i == maxFaults:
			s.log.Error("more is wrong with a file than is said here", "file", path, "faults", len(r.faults))
			return
		case f.harmless:
			s.log.Warn("an object is not read", "at", at(f), "reason", f.reason)
		default:
			s.log.Error("a manifest cannot be used; what it said before goes on being served", "at", at(f), "reason", f.reason)
		}
	}
}

// note passes on which files are not served as they are.
func (s *Source) note() {
	problems := slices.Sorted(maps.Values(s.faulty))
	if !s.emptied.IsZero() {
		problems = append(problems, fmt.Sprintf("%s has no manifest any more; its objects are served until %s",
			s.dir, s.emptied.Add(s.grace).Format(time.RFC3339)))
	}
	if s.Noted != nil && !slices.Equal(problems, s.noted) {
		s.noted = problems
		s.Noted(problems)
	}
}

var (
	errReplaced     = errors.New("another directory has taken its place")
	errBeingWritten = errors.New("being written")
	errNotAFile     = errors.New("not a regular file")
)

// open opens a file, unless a program is writing to it.
func (s *Source) open(name string) (*os.File, fs.FileInfo, error) {
	// A pipe must not be waited for.
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s: %w", f.Name(), errNotAFile)
	case s.waitsForWriter(name, f):
		err = errBeingWritten
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}
