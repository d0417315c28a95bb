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

// quiet is how long nothing must happen to the file before it is read again:
// an editor writes in several steps.
const quiet = 100 * time.Millisecond

// Watch calls changed whenever the file of --config has changed, with what it
// says now or why that cannot be used, until ctx ends. Without --config it
// returns at once. Config must have been called, and is not called meanwhile.
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
	settled := time.NewTimer(quiet) // it may have changed since Config read it
	defer settled.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-watcher.Events:
			if !open {
				return nil
			}
			settled.Reset(quiet)
		case err := <-watcher.Errors:
			log.Debug("events of the configuration file were lost; it is read again", "error", err)
			settled.Reset(quiet)
		case <-settled.C:
			f.follow(watcher)
			f.readAgain(changed)
		}
	}
}

// follow watches the directory of the file that the path leads to at present.
// Directories are watched because a file that is renamed into place is another
// file; the path's own, because a mounted ConfigMap is switched by a link there.
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
