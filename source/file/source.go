// SPDX-License-Identifier: Apache-2.0

// Package file is the source that reads a directory of manifests, for a node
// without an API server: Services, EndpointSlices, Nodes and ServiceCIDRs in
// YAML or JSON, one or more objects per file. The directory is watched, without
// its sub-directories. The sink receives only objects that changed.
//
// A document with a fault never takes others down. The log names the file, the
// document, the object and the field. While a file has such a document, the
// file's earlier objects stay, unless its other documents replace them. The same
// holds for a file or a directory that cannot be read. The source reads it again
// every second.
//
// A directory without any manifest keeps its objects for 30 s: an unmounted file
// system looks like this. When single files are removed, their objects go at
// once. When the path leads to another directory, the source follows within
// about a second.
//
// A goroutine reads each file of more than 1 MiB, so that other files do not
// wait. Such a file is parsed only if it has the name of a kind that is read.
//
// Endpoints objects are ignored with a warning: only EndpointSlices count.
//
// If two files have the same object, the file whose name sorts first wins.
package file

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"signalbox/proxier/service"
)

const (
	// quietTime without events ends a batch of changes, which are then read: long
	// enough to see the writes of one program together.
	quietTime = 3 * time.Millisecond
	// maxBatchTime bounds the batch where events never end.
	maxBatchTime = 500 * time.Millisecond
	// pollPeriod is how often the source looks for a directory that cannot be
	// watched, and for another directory at the path. A mount over the path, a
	// renamed parent or a switched link cause no event.
	pollPeriod = time.Second
	// emptyGrace is how long the objects of a directory without manifests stay.
	emptyGrace = 30 * time.Second
)

// Source reads the manifests of a directory and watches it.
type Source struct {
	// OnProblems receives one sorted line per file that is not served as it is,
	// whenever the lines change; may be nil.
	OnProblems func(problems []string)

	dir string
	log *slog.Logger
	// newWatcher is fsnotify.NewWatcher. It fails if root's programs have all inotify instances
	// that the kernel allows.
	newWatcher func() (*fsnotify.Watcher, error)
	watched    bool          // events of the directory come
	unwatched  string        // the last logged error of a watch
	synced     bool          // the sink has all objects
	grace      time.Duration // emptyGrace
	catalog    *catalog
	// fingerprints of the files as they were last read.
	fingerprints map[string]uint64
	// writers has the time when a file was first seen open for writing.
	writers map[string]time.Time
	// large has the readings of large files, nil while a goroutine reads the file.
	large     map[string]*reading
	largeRead chan *reading
	// unread are the files that could not be read. They are read again every
	// pollPeriod, because the cause may cause no event.
	unread map[string]bool
	// unsent are objects that changed while no file could be read that has them.
	unsent []key
	// problems by file: why it is not served as it is.
	problems map[string]string
	reported []string
	// emptySince is when the last manifest disappeared; zero if there are
	// manifests, or no objects.
	emptySince time.Time
}

// New returns a Source for dir. The source waits for a directory that does not
// exist yet; anything else at that path is an error.
func New(dir string, log *slog.Logger) (*Source, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("finding the directory of manifests: %w", err)
	}
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", dir)
	}
	return &Source{
		dir: dir, log: log.With("directory", dir), newWatcher: fsnotify.NewWatcher, grace: emptyGrace, catalog: newCatalog(log), fingerprints: map[string]uint64{},
		writers: map[string]time.Time{}, large: map[string]*reading{}, largeRead: make(chan *reading), unread: map[string]bool{}, problems: map[string]string{},
	}, nil
}

// Run sends the objects of the manifests to the sink until ctx ends, and returns
// nil then. If the directory cannot be read, the source tries again and the sink
// keeps its objects. If the kernel allows no file watches, the source reads the directory
// every pollPeriod.
func (s *Source) Run(ctx context.Context, sink service.Sink) error {
	for ctx.Err() == nil {
		err := s.watch(ctx, sink)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, errReplaced) || errors.Is(err, errNotWatched) {
			continue
		}
		s.reportUnwatched("the directory cannot be read; its objects stay, and the source tries again", err)
		s.reportProblems()
		select {
		case <-ctx.Done():
		case <-time.After(pollPeriod):
		}
	}
	return nil
}

// reportUnwatched logs each error once.
func (s *Source) reportUnwatched(what string, err error) {
	if text := fmt.Sprint(err); text != s.unwatched {
		s.unwatched = text
		s.log.Warn(what, "error", err)
	}
	s.problems[s.dir] = fmt.Sprintf("the directory cannot be watched: %v", err)
}

// watch reads all of the directory, and then each change, until the directory
// is gone. If there can be no events, it returns after pollPeriod.
func (s *Source) watch(ctx context.Context, sink service.Sink) error {
	identity, err := os.Stat(s.dir) // before the watch begins, so that no replacement is missed
	if err != nil {
		return err
	}
	watcher, err := s.newWatcher()
	if err == nil {
		defer watcher.Close()
		err = watcher.Add(s.dir)
	}
	s.watched = err == nil
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("watching %s: %w", s.dir, err)
	case err != nil:
		s.reportUnwatched("the directory cannot be watched; it is read every second", err)
		watcher = &fsnotify.Watcher{} // without events
	default:
		s.unwatched, s.synced = "", false
		delete(s.problems, s.dir)
	}
	unfinished, err := s.readAll(ctx, sink)
	for err == nil {
		s.reportProblems()
		if !s.synced && len(unfinished) == 0 && len(s.large) == 0 {
			s.synced = true
			sink.Synced()
		}
		var c change
		if c, err = s.changes(ctx, watcher, identity, unfinished); err != nil {
			return err
		}
		if c.all {
			unfinished, err = s.readAll(ctx, sink)
		} else {
			unfinished = s.readSome(ctx, c.names, sink, c.newFiles)
		}
	}
	return err
}

// change is what happened in the directory.
type change struct {
	names map[string]bool // of manifests
	// all files must be read: events were lost, or the link changed that switches
	// a mounted ConfigMap.
	all bool
	// newFiles: all files appeared just now. If they were renamed into place, they
	// are complete.
	newFiles bool
}

// changes waits for changes and then, unless files appeared, for quietTime.
// Unfinished files count as changed. The error errReplaced says that another
// directory than that of the identity is at the path. errNotWatched says that no events
// come, and that pollPeriod is over.
func (s *Source) changes(ctx context.Context, watcher *fsnotify.Watcher, identity fs.FileInfo, unfinished map[string]bool) (change, error) {
	c := change{names: map[string]bool{}}
	poll := time.NewTicker(pollPeriod)
	defer poll.Stop()
	var quiet, batchEnd, graceEnd <-chan time.Time
	if !s.emptySince.IsZero() {
		graceEnd = time.After(time.Until(s.emptySince.Add(s.grace)))
	}
	if len(unfinished) > 0 {
		c.names, quiet, batchEnd = unfinished, time.After(quietTime), time.After(maxBatchTime)
	}
	for {
		select {
		case <-ctx.Done():
			return c, ctx.Err()
		case <-quiet:
			return c, nil
		case <-batchEnd:
			c.newFiles = false
			return c, nil
		case <-graceEnd:
			c.all = true
			return c, nil
		case <-poll.C:
			if now, err := os.Stat(s.dir); err == nil && !os.SameFile(now, identity) {
				return c, errReplaced
			}
			if !s.watched {
				return c, errNotWatched
			}
			if len(s.unread) == 0 {
				continue
			}
			maps.Copy(c.names, s.unread)
			return c, nil
		case r := <-s.largeRead:
			s.large[r.name] = r
			c.names[r.name] = true
		case err, ok := <-watcher.Errors:
			if !ok {
				return c, fs.ErrNotExist
			}
			s.log.Debug("events of the directory were lost; all its files are read again", "error", err)
			c.all = true
		case event, ok := <-watcher.Events:
			base := filepath.Base(event.Name)
			switch {
			case !ok || event.Name == s.dir && event.Has(fsnotify.Remove|fsnotify.Rename):
				return c, fmt.Errorf("%s: %w", s.dir, fs.ErrNotExist)
			case isManifest(base):
				c.names[base] = true
				c.newFiles = event.Op == fsnotify.Create && (quiet == nil || c.newFiles)
			case strings.HasPrefix(base, ".."):
				c.all = true
			default:
				continue
			}
		}
		if c.newFiles {
			quiet = time.After(0)
		} else {
			quiet = time.After(quietTime)
		}
		if batchEnd == nil {
			batchEnd = time.After(maxBatchTime)
		}
	}
}

// isManifest looks at the name's extension. Hidden files belong to other
// programs.
func isManifest(name string) bool {
	return !strings.HasPrefix(name, ".") && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name))
}
