// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
)

// quietTime without events must pass before files are read again: an editor
// writes in several steps.
const quietTime = 100 * time.Millisecond

// longestWait bounds the wait in a directory where other files change all the time.
const longestWait = time.Second

// Watch calls changed after each change of the --config file or of the kubeconfig, with
// the new Config or the error, until ctx ends. Without both it returns at once. Config
// must have been called before, and must not be called during Watch.
func (f *Flags) Watch(ctx context.Context, log *slog.Logger, changed func(*Config, error)) {
	if len(f.watched()) == 0 {
		return
	}
	if err := f.watch(ctx, log, changed); err != nil {
		log.Warn("changes of the configuration are not seen; they count from the next start on", "files", f.watched(), "error", err)
	}
}

// watched lists the files whose changes count.
func (f *Flags) watched() []string {
	return slices.DeleteFunc([]string{f.file, f.kubeconfig}, func(path string) bool { return path == "" })
}

func (f *Flags) watch(ctx context.Context, log *slog.Logger, changed func(*Config, error)) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching files: %w", err)
	}
	defer watcher.Close()
	for _, path := range f.watched() {
		if err := watcher.Add(filepath.Dir(path)); err != nil {
			return fmt.Errorf("watching %s: %w", filepath.Dir(path), err)
		}
	}
	quiet := time.NewTimer(quietTime) // the files may have changed since Config read them
	defer quiet.Stop()
	var waiting time.Time // since when an event waits; zero for none
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-watcher.Events:
			if !open {
				return nil
			}
			if waiting.IsZero() {
				waiting = time.Now()
			}
			if time.Since(waiting) < longestWait {
				quiet.Reset(quietTime)
			}
		case err := <-watcher.Errors:
			log.Debug("events of the configuration were lost; its files are read again", "error", err)
			quiet.Reset(quietTime)
		case <-quiet.C:
			waiting = time.Time{}
			f.follow(watcher)
			before := f.kubeconfig
			if f.readAgain(changed); f.kubeconfig != before {
				quiet.Reset(quietTime) // follow the other kubeconfig
			}
		}
	}
}

// follow watches the directories of the files, and of the files to which links lead. A
// watch on a file would miss another one that is renamed into place. The directory of the
// path is watched too, because a link there switches a mounted ConfigMap.
func (f *Flags) follow(watcher *fsnotify.Watcher) {
	for _, path := range f.watched() {
		_ = watcher.Add(filepath.Dir(path)) // reading the file reports what is wrong
		if target, err := filepath.EvalSymlinks(path); err == nil {
			_ = watcher.Add(filepath.Dir(target))
		}
	}
}

func (f *Flags) readAgain(changed func(*Config, error)) {
	digest := digestOf(f.kubeconfig)
	if digest == f.digest && f.sameText() {
		return
	}
	f.digest = digest
	changed(f.Config())
}

// sameText says whether the --config file, if there is one, is as it was last read.
func (f *Flags) sameText() bool {
	if f.file == "" {
		return true
	}
	now, err := os.ReadFile(f.file)
	return err == nil && bytes.Equal(now, f.text)
}

// digestOf is a digest of a file's content, the zero value for a file that cannot be read.
func digestOf(path string) (digest [sha256.Size]byte) {
	if text, err := os.ReadFile(path); err == nil {
		digest = sha256.Sum256(text)
	}
	return digest
}
