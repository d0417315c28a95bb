package file

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"signalbox/proxier"
)

const (
	// quiet is how long nothing must happen before a change is read: long
	// enough for the writes of one program to be seen together, short enough
	// for nobody to wait for it.
	quiet = 3 * time.Millisecond
	// longest bounds the wait for quiet in a directory that is written to
	// without end.
	longest = 500 * time.Millisecond
	// maxFaults is how many faults of a file are logged.
	maxFaults = 20
	// again is how soon a directory that cannot be watched is looked for again.
	again = time.Second
)

// Source reads the manifests of a directory and watches it.
type Source struct {
	dir     string
	log     *slog.Logger
	catalog *catalog
	content map[string]uint64 // fingerprint of each file that was read
	// busy says since when files have been seen open for writing.
	busy map[string]time.Time
}

// New returns a Source for dir. A directory that does not exist yet is waited
// for; anything else at that path is an error.
func New(dir string, log *slog.Logger) (*Source, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("finding the directory of manifests: %w", err)
	}
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", dir)
	}
	return &Source{dir: dir, log: log.With("directory", dir), catalog: newCatalog(log), content: map[string]uint64{}, busy: map[string]time.Time{}}, nil
}

// Run tells the sink what the manifests say until ctx ends, and returns nil
// then. A directory that cannot be read is tried again; what it said before
// stays with the sink. The error is about the kernel's file watches: without
// them nothing would ever change.
func (s *Source) Run(ctx context.Context, sink proxier.Sink) error {
	last := ""
	for ctx.Err() == nil {
		err := s.watch(ctx, sink)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, errReplaced) {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			return err
		}
		if text := fmt.Sprint(err); text != last {
			last = text
			s.log.Warn("the directory cannot be watched; what it held before goes on being served, and it is looked for again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(again):
		}
	}
	return nil
}

// watch reads the whole directory and then what changes, until the directory
// itself is gone.
func (s *Source) watch(ctx context.Context, sink proxier.Sink) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching files: %w", err)
	}
	defer watcher.Close()
	if err := watcher.Add(s.dir); err != nil {
		return fmt.Errorf("watching %s: %w", s.dir, err)
	}
	// A watch follows what was at the path when it began. Where the path is a
	// link that is switched to another directory, only its parent tells.
	if parent := filepath.Dir(s.dir); parent != s.dir {
		if err := watcher.Add(parent); err != nil {
			s.log.Debug("cannot see the directory being replaced", "error", err)
		}
	}
	unsettled, err := s.readAll(sink)
	for synced := false; err == nil; {
		if !synced && len(unsettled) == 0 {
			synced = true
			sink.Synced()
		}
		var c change
		if c, err = s.changes(ctx, watcher, unsettled); err != nil {
			return err
		}
		if c.all {
			unsettled, err = s.readAll(sink)
		} else {
			unsettled = s.readSome(c.names, sink, c.hasty)
		}
	}
	return err
}

// change is what happened in the directory.
type change struct {
	names map[string]bool // of manifests
	// all asks for everything to be read: events were lost, or the link that a
	// mounted ConfigMap is switched by changed.
	all bool
	// hasty says that files appeared just now. They are whole if they were
	// renamed into place, as careful programs do.
	hasty bool
}

// changes waits for something to happen and then, unless a file appeared, for
// quiet. What is unsettled from before counts as just changed.
func (s *Source) changes(ctx context.Context, watcher *fsnotify.Watcher, unsettled map[string]bool) (change, error) {
	c := change{names: map[string]bool{}}
	var calm, late <-chan time.Time
	if len(unsettled) > 0 {
		c.names, calm, late = unsettled, time.After(quiet), time.After(longest)
	}
	for {
		wait := quiet
		select {
		case <-ctx.Done():
			return c, ctx.Err()
		case <-calm:
			return c, nil
		case <-late:
			c.hasty = false
			return c, nil
		case err, ok := <-watcher.Errors:
			if !ok {
				return c, fs.ErrNotExist
			}
			s.log.Debug("watching files", "error", err)
			c.all = true
		case event, ok := <-watcher.Events:
			base := filepath.Base(event.Name)
			switch {
			case !ok || event.Name == s.dir && event.Has(fsnotify.Remove|fsnotify.Rename):
				return c, fmt.Errorf("%s: %w", s.dir, fs.ErrNotExist)
			case event.Name == s.dir && event.Has(fsnotify.Create):
				return c, errReplaced
			case filepath.Dir(event.Name) != s.dir:
				continue // of what stands beside the directory
			case isManifest(base):
				c.names[base] = true
				c.hasty = event.Op == fsnotify.Create && (calm == nil || c.hasty)
			case strings.HasPrefix(base, ".."):
				c.all = true
			default:
				continue
			}
		}
		if c.hasty {
			wait = 0
		}
		calm = time.After(wait)
		if late == nil {
			late = time.After(longest)
		}
	}
}

// isManifest goes by the name's ending; hidden files are other programs' own.
func isManifest(name string) bool {
	base := filepath.Base(name)
	return !strings.HasPrefix(base, ".") && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(base))
}

func (s *Source) readAll(sink proxier.Sink) (unsettled map[string]bool, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", s.dir, err)
	}
	names := map[string]bool{}
	for name := range s.content {
		names[name] = true // also those that are gone
	}
	for _, e := range entries {
		if isManifest(e.Name()) {
			names[e.Name()] = true
		}
	}
	return s.readSome(names, sink, false), nil
}

// readSome reads the named files. It takes no notice of files that are being
// written and returns their names; a hasty reading does so with every file that
// has faults, which may only be half written.
func (s *Source) readSome(names map[string]bool, sink proxier.Sink, hasty bool) (unsettled map[string]bool) {
	var concerned []key
	fresh := map[string]map[key]manifest{}
	for name := range names {
		some, ok := s.readOne(name, hasty, fresh)
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
func (s *Source) readOne(name string, hasty bool, fresh map[string]map[key]manifest) (concerned []key, ok bool) {
	content, err := s.readWhole(name)
	switch {
	case errors.Is(err, errBeingWritten):
		return nil, false
	case errors.Is(err, fs.ErrNotExist):
		delete(s.content, name)
		return s.catalog.set(name, nil, false), true
	case err != nil:
		s.log.Warn("a file cannot be read; what it held before goes on being served", "error", err)
		return nil, true
	}
	fingerprint := maphash.Bytes(seed, content)
	if known, read := s.content[name]; read && known == fingerprint {
		return nil, true
	}
	found, faults := read(content)
	if hasty && (len(faults) > 0 || len(content) == 0) {
		return nil, false
	}
	s.content[name] = fingerprint
	for i, f := range faults {
		if i == maxFaults {
			s.log.Error("more is wrong with a file than is said here", "file", filepath.Join(s.dir, name), "faults", len(faults))
			break
		}
		s.log.Error("a manifest cannot be used; what it said before goes on being served",
			"at", fmt.Sprintf("%s:%d", filepath.Join(s.dir, name), f.line), "reason", f.reason)
	}
	fresh[name] = found
	return s.catalog.set(name, found, len(faults) > 0), true
}

var (
	errReplaced     = errors.New("another directory has taken its place")
	errBeingWritten = errors.New("being written")
	errNotAFile     = errors.New("not a regular file")
)

// readWhole returns what a file holds, unless a program is writing to it.
func (s *Source) readWhole(name string) ([]byte, error) {
	// A pipe must not be waited for.
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w", f.Name(), errNotAFile)
	}
	if !beingWritten(f) {
		delete(s.busy, name)
		return io.ReadAll(f)
	}
	since, busy := s.busy[name]
	if !busy {
		since = time.Now()
		s.busy[name] = since
	}
	if time.Since(since) < writerPatience {
		return nil, errBeingWritten
	}
	return io.ReadAll(f)
}
