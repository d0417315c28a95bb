package config

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// quietTime without events must pass before the file is read again: an editor
// writes in several steps.
const quietTime = 100 * time.Millisecond

// Watch calls changed after each change of the --config file, with the new Config or
// the error, until ctx ends. Without --config it returns at once. Config must have
// been called before, and must not be called during Watch.
func (f *Flags) Watch(ctx context.Context, log *slog.Logger, changed func(*Config, error)) {
	if f.file == "" {
		return
	}
	log = log.With("file", f.file)
	if err := f.watch(ctx, log, changed); err != nil {
		log.Warn("changes of the configuration file are not seen; they count from the next start on", "error", err)
	}
}

func (f *Flags) watch(ctx context.Context, log *slog.Logger, changed func(*Config, error)) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching files: %w", err)
	}
	defer watcher.Close()
	if err := watcher.Add(filepath.Dir(f.file)); err != nil {
		return fmt.Errorf("watching %s: %w", filepath.Dir(f.file), err)
	}
	quiet := time.NewTimer(quietTime) // the file may have changed since Config read it
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-watcher.Events:
			if !open {
				return nil
			}
			quiet.Reset(quietTime)
		case err := <-watcher.Errors:
			log.Debug("events of the configuration file were lost; it is read again", "error", err)
			quiet.Reset(quietTime)
		case <-quiet.C:
			f.follow(watcher)
			f.readAgain(changed)
		}
	}
}

// follow watches the directory of the file to which the path leads. A watch on the
// file would miss a file that is renamed into place. The directory of the path is
// watched too, because a link there switches a mounted ConfigMap.
func (f *Flags) follow(watcher *fsnotify.Watcher) {
	if target, err := filepath.EvalSymlinks(f.file); err == nil {
		_ = watcher.Add(filepath.Dir(target)) // the path's own is watched anyway
	}
}

func (f *Flags) readAgain(changed func(*Config, error)) {
	now, err := os.ReadFile(f.file)
	if err == nil && bytes.Equal(now, f.text) {
		return
	}
	changed(f.Config())
}
