package file

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

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
	// again is how soon a directory that cannot be watched is looked for again.
	again = time.Second
)

// Source reads the manifests of a directory and watches it.
type Source struct {
	dir     string
	log     *slog.Logger
	catalog *catalog
	content map[string]uint64 // fingerprint of each file that was read
}

// New returns a Source for dir. A directory that does not exist yet is waited
// for; anything else at that path is an error.
func New(dir string, log *slog.Logger) (*Source, error) {
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", dir)
	}
	return &Source{dir: dir, log: log.With("directory", dir), catalog: newCatalog(log), content: map[string]uint64{}}, nil
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
	if err := s.readAll(sink); err != nil {
		return err
	}
	sink.Synced()
	for {
		names, all, err := s.changes(ctx, watcher)
		if err != nil {
			return err
		}
		if !all {
			s.readSome(names, sink)
			continue
		}
		if err := s.readAll(sink); err != nil {
			return err
		}
	}
}

// changes waits for something to happen and then for quiet. all asks for
// everything to be read: events were lost, or a name that is no manifest's
// changed, such as the link that a mounted ConfigMap is switched by.
func (s *Source) changes(ctx context.Context, watcher *fsnotify.Watcher) (names map[string]bool, all bool, err error) {
	names = map[string]bool{}
	var calm, late <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil, false, ctx.Err()
		case <-calm:
			return names, all, nil
		case <-late:
			return names, all, nil
		case err, ok := <-watcher.Errors:
			if !ok {
				return nil, false, fs.ErrNotExist
			}
			s.log.Debug("watching files", "error", err)
			all = true
		case event, ok := <-watcher.Events:
			if !ok || event.Name == s.dir && event.Has(fsnotify.Remove|fsnotify.Rename) {
				return nil, false, fmt.Errorf("%s: %w", s.dir, fs.ErrNotExist)
			}
			if event.Op == fsnotify.Chmod && !isManifest(event.Name) {
				continue
			}
			if isManifest(event.Name) {
				names[filepath.Base(event.Name)] = true
			} else {
				all = true
			}
		}
		calm = time.After(quiet)
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

func (s *Source) readAll(sink proxier.Sink) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("reading %s: %w", s.dir, err)
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
	s.readSome(names, sink)
	return nil
}

func (s *Source) readSome(names map[string]bool, sink proxier.Sink) {
	var concerned []key
	for name := range names {
		concerned = append(concerned, s.readOne(name)...)
	}
	s.catalog.tell(concerned, sink)
}

// readOne reads a file, if it has changed since it was last read, and returns
// the objects that this concerns.
func (s *Source) readOne(name string) []key {
	content, err := os.ReadFile(filepath.Join(s.dir, name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		delete(s.content, name)
		return s.catalog.set(name, nil, false)
	case err != nil:
		s.log.Warn("a file cannot be read; what it held before goes on being served", "error", err)
		return nil
	}
	fingerprint := maphash.Bytes(seed, content)
	if known, read := s.content[name]; read && known == fingerprint {
		return nil
	}
	s.content[name] = fingerprint
	found, faults := read(content)
	for _, f := range faults {
		s.log.Error("a manifest cannot be used; what it said before goes on being served",
			"at", fmt.Sprintf("%s:%d", filepath.Join(s.dir, name), f.line), "reason", f.reason)
	}
	return s.catalog.set(name, found, len(faults) > 0)
}
