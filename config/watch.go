// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"

	"signalbox/internal/wait"
)

// quietTime without events must pass before files are read again: an editor
// writes in several steps.
const quietTime = 100 * time.Millisecond

// longestWait bounds the wait in a directory where other files change all the time.
const longestWait = time.Second

const (
	// pollPeriod is how often the files are read without an event. Some changes cause
	// none: a mount, a renamed parent directory, a file system of another machine.
	pollPeriod = 10 * time.Second
	// retryPeriod is the same while a file cannot be read or watched.
	retryPeriod = time.Second
)

// Watch calls changed after each change of the --config file or of the kubeconfig, with
// the new Config or the error, until ctx ends. Without both it returns at once. Config
// must have been called before, and must not be called during Watch.
func (f *Flags) Watch(ctx context.Context, log *slog.Logger, changed func(*Config, error)) {
	logged := ""
	for len(f.watched()) > 0 && ctx.Err() == nil {
		err := f.watch(ctx, log, changed)
		if err != nil && err.Error() != logged {
			logged = err.Error()
			log.Info("the files of the configuration cannot be watched; they are read periodically", "files", f.watched(), "every", retryPeriod, "error", err)
		}
		if wait.For(ctx, retryPeriod) {
			f.readAgain(changed)
		}
	}
}

// watched lists the files whose changes count.
func (f *Flags) watched() []string {
	return slices.DeleteFunc([]string{f.file, f.kubeconfig}, func(path string) bool { return path == "" })
}

// watch returns an error if there can be no events of files, and nil when ctx ends.
func (f *Flags) watch(ctx context.Context, log *slog.Logger, changed func(*Config, error)) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching files: %w", err)
	}
	defer watcher.Close()
	f.follow(watcher)
	quiet := time.NewTimer(quietTime) // the files may have changed since Config read them
	defer quiet.Stop()
	var waiting time.Time // since when an event waits; zero for none
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-watcher.Events:
			if !open {
				return errors.New("watching files: the kernel sends no events any more")
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
			quiet.Reset(f.catchUp(watcher, changed))
		}
	}
}

// catchUp follows the files and reads them. It returns when both are due again if no event
// comes.
func (f *Flags) catchUp(watcher *fsnotify.Watcher, changed func(*Config, error)) time.Duration {
	before := f.kubeconfig
	followed := f.follow(watcher)
	read := f.readAgain(changed)
	switch {
	case f.kubeconfig != before:
		return quietTime // follow the other kubeconfig
	case !followed || !read:
		return retryPeriod
	}
	return pollPeriod
}

// follow watches the directories of the files, and of the files to which links lead. A
// watch on a file would miss another one that is renamed into place. The directory of the
// path is watched too, because a link there switches a mounted ConfigMap. It returns false
// if a directory cannot be watched.
func (f *Flags) follow(watcher *fsnotify.Watcher) (ok bool) {
	ok = true
	for _, path := range f.watched() {
		ok = watcher.Add(filepath.Dir(path)) == nil && ok
		if target, err := filepath.EvalSymlinks(path); err == nil {
			ok = watcher.Add(filepath.Dir(target)) == nil && ok
		}
	}
	return ok
}

// readAgain calls changed if the files differ from what was last read. It returns false if
// a file cannot be read. Then it calls changed once for each reason.
func (f *Flags) readAgain(changed func(*Config, error)) (read bool) {
	digest := digestOf(f.kubeconfig)
	if digest != f.digest || !f.sameText() || f.unread != "" {
		f.digest = digest
		c, err := f.Config()
		before := f.unread
		f.unread = ""
		if cause := syscall.Errno(0); errors.As(err, &cause) {
			f.unread = err.Error()
		}
		if f.unread == "" || f.unread != before {
			changed(c, err)
		}
	}
	return f.unread == "" && (f.kubeconfig == "" || f.digest != [sha256.Size]byte{})
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
