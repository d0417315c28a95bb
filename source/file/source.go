package file

import (
	"context"
	"errors"
	"fmt"
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
	// maxFaults is how many faults of a file are logged.
	maxFaults = 20
	// again is how soon a directory that cannot be watched is looked for again,
	// and how often the path is asked whether it leads to another directory: a
	// mount over the path and a renamed parent cause no event.
	again = time.Second
	// emptyGrace is how long the objects of a directory stay that has no manifest
	// any more. A file system that is not mounted yet looks like that.
	emptyGrace = 30 * time.Second
)

// Source reads the manifests of a directory and watches it.
type Source struct {
	// Noted is told of the files that are not served as they are, one sorted line
	// each, whenever these lines change; may be nil.
	Noted func(problems []string)

	dir     string
	log     *slog.Logger
	grace   time.Duration // emptyGrace
	catalog *catalog
	content map[string]uint64 // fingerprint of each file that was read
	// busy says since when files have been seen open for writing.
	busy map[string]time.Time
	// large are the files that goroutines are reading; see readLater.
	large     map[string]*reading
	largeRead chan *reading
	// faulty says of each file that cannot be used wholly why not.
	faulty map[string]string
	// emptied is when a directory with manifests was found without any; zero: it
	// has some, or its objects are gone.
	emptied time.Time
	noted   []string
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
	return &Source{
		dir: dir, log: log.With("directory", dir), grace: emptyGrace, catalog: newCatalog(log), content: map[string]uint64{},
		busy: map[string]time.Time{}, large: map[string]*reading{}, largeRead: make(chan *reading), faulty: map[string]string{},
	}, nil
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
		s.faulty[s.dir] = fmt.Sprintf("the directory cannot be watched: %v", err)
		s.note()
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
	identity, err := os.Stat(s.dir) // before the watch: what comes between is noticed
	if err != nil {
		return err
	}
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
	delete(s.faulty, s.dir)
	unsettled, err := s.readAll(ctx, sink)
	for synced := false; err == nil; {
		s.note()
		if !synced && len(unsettled) == 0 && len(s.large) == 0 {
			synced = true
			sink.Synced()
		}
		var c change
		if c, err = s.changes(ctx, watcher, identity, unsettled); err != nil {
			return err
		}
		if c.all {
			unsettled, err = s.readAll(ctx, sink)
		} else {
			unsettled = s.readSome(ctx, c.names, sink, c.hasty)
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
// quiet. What is unsettled from before counts as just changed. An error says
// that the path does not lead to the directory of that identity any more.
func (s *Source) changes(ctx context.Context, watcher *fsnotify.Watcher, identity fs.FileInfo, unsettled map[string]bool) (change, error) {
	c := change{names: map[string]bool{}}
	poll := time.NewTicker(again)
	defer poll.Stop()
	var calm, late, graceOver <-chan time.Time
	if !s.emptied.IsZero() {
		graceOver = time.After(time.Until(s.emptied.Add(s.grace)))
	}
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
		case <-graceOver:
			c.all = true
			return c, nil
		case <-poll.C:
			if now, err := os.Stat(s.dir); err == nil && !os.SameFile(now, identity) {
				return c, errReplaced
			}
			continue
		case r := <-s.largeRead:
			s.large[r.name] = r
			c.names[r.name] = true
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
