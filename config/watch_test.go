// SPDX-License-Identifier: Apache-2.0

package config

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"signalbox/internal/nstest"
	"signalbox/internal/wait"
)

// seen is what Watch calls out.
type seen struct {
	config *Config
	err    error
}

// configured has the Flags of these arguments, and their Config.
func configured(t *testing.T, args ...string) (*Flags, *Config) {
	t.Helper()
	var flags Flags
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.Add(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	c, err := flags.Config()
	if err != nil {
		t.Fatal(err)
	}
	return &flags, c
}

// watch starts Watch. end ends it and waits for that.
func watch(t *testing.T, flags *Flags) (changes chan seen, end func()) {
	ctx, cancel := context.WithCancel(t.Context())
	changes, ended := make(chan seen, 100), make(chan struct{})
	go func() {
		defer close(ended)
		flags.Watch(ctx, slog.New(slog.NewTextHandler(t.Output(), nil)), func(c *Config, err error) { changes <- seen{c, err} })
	}()
	return changes, func() { cancel(); <-ended }
}

// Every way in which a file is changed is seen, and a wrong one is named.
func TestWatch(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.conf")
	// No step of this can be seen half done.
	replace := func(text string) {
		t.Helper()
		other := filepath.Join(dir, "other")
		if err := errors.Join(os.WriteFile(other, []byte(fileHead+text), 0o600), os.Rename(other, path)); err != nil {
			t.Fatal(err)
		}
	}
	replace("mode: iptables")
	flags, c := configured(t, "--config="+path, "--hostname-override=n")
	changes, end := watch(t, flags)
	defer end()
	if c.Mode != "iptables" {
		t.Fatalf("%+v", c)
	}

	replace("mode: ipvs")
	if s := <-changes; s.err != nil || s.config.Mode != "ipvs" {
		t.Errorf("renamed into place: %+v", s)
	}
	replace("mode: nftables")
	<-changes
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteString(fileHead + "mode: iptables"); err != nil { // as long as what was there
		t.Fatal(err)
	}
	if s := <-changes; s.err != nil || s.config.Mode != "iptables" {
		t.Errorf("written in place: %+v", s)
	}
	replace("mode: none")
	if s := <-changes; s.err == nil || !strings.Contains(s.err.Error(), path+": mode: none: not one of") {
		t.Errorf("a wrong file: %+v", s)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if s := <-changes; s.err == nil || !strings.Contains(s.err.Error(), "no such file") {
		t.Errorf("a file that is gone: %+v", s)
	}
	replace("mode: nftables\nclusterCIDR: 10.0.0.0/8")
	if s := <-changes; s.err != nil || len(s.config.Settings.ClusterCIDRs) != 1 {
		t.Errorf("written again: %+v", s)
	}
	elsewhere := filepath.Join(t.TempDir(), "config.conf")
	if err := errors.Join(os.WriteFile(elsewhere, []byte(fileHead+"mode: ipvs"), 0o600), os.Remove(path), os.Symlink(elsewhere, path)); err != nil {
		t.Fatal(err)
	}
	for s := range changes { // the moment without a file may be seen, too
		if s.err == nil {
			break
		}
	}
	if err := errors.Join(os.WriteFile(elsewhere+".new", []byte(fileHead+"mode: iptables"), 0o600), os.Rename(elsewhere+".new", elsewhere)); err != nil {
		t.Fatal(err)
	}
	if s := <-changes; s.err != nil || s.config.Mode != "iptables" {
		t.Errorf("a file behind a link: %+v", s)
	}
	if len(changes) > 0 {
		t.Errorf("%d more changes than there were", len(changes))
	}
}

// wantMode waits for a Config with the mode.
func wantMode(t *testing.T, changes chan seen, mode string) {
	t.Helper()
	if s := <-changes; s.err != nil || s.config.Mode != mode {
		t.Fatalf("%+v, want mode %s", s, mode)
	}
}

// wantUnread waits for an error, and that it is reported once.
func wantUnread(t *testing.T, changes chan seen, reason string) {
	t.Helper()
	if s := <-changes; s.err == nil || !strings.Contains(s.err.Error(), reason) {
		t.Fatalf("%+v, want an error with %q", s, reason)
	}
	time.Sleep(2 * retryPeriod)
	if len(changes) > 0 {
		t.Fatalf("%q is reported again: %+v", reason, <-changes)
	}
}

// A directory that is removed and made again is watched again. So is one whose parent is
// replaced, which causes no event.
func TestWatchOfReplacedDirectory(t *testing.T) {
	t.Parallel()
	parent := filepath.Join(t.TempDir(), "parent")
	dir := filepath.Join(parent, "dir")
	path := filepath.Join(dir, "config.conf")
	write := func(mode string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(path+".new", []byte(fileHead+"mode: "+mode), 0o600), os.Rename(path+".new", path)); err != nil {
			t.Fatal(err)
		}
	}
	write("iptables")
	flags, _ := configured(t, "--config="+path, "--hostname-override=n")
	changes, end := watch(t, flags)
	defer end()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	wantUnread(t, changes, "no such file")
	write("ipvs")
	wantMode(t, changes, "ipvs")
	write("nftables")
	wantMode(t, changes, "nftables")
	replacement := filepath.Join(parent+".new", "dir")
	if err := errors.Join(os.MkdirAll(replacement, 0o700), os.WriteFile(filepath.Join(replacement, "config.conf"), []byte(fileHead+"mode: iptables"), 0o600),
		os.Rename(parent, parent+".old"), os.Rename(parent+".new", parent)); err != nil {
		t.Fatal(err)
	}
	for s := range changes { // the moment without a file may be seen, too
		if s.err == nil && s.config.Mode != "iptables" {
			t.Errorf("the replacement: %+v", s)
		}
		if s.err == nil {
			break
		}
	}
	write("ipvs")
	wantMode(t, changes, "ipvs")
}

// A file that cannot be read, because the process has no descriptor left, is read when it
// has, also if the file has not changed. So is one that cannot be watched.
func TestWatchAfterDescriptorsRanOut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.conf")
	write := func(path, mode string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(fileHead+"mode: "+mode), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(path, "iptables")
	flags, _ := configured(t, "--config="+path, "--hostname-override=n")
	changes, end := watch(t, flags)
	write(path, "nftables")
	wantMode(t, changes, "nftables")
	for _, mode := range []string{"ipvs", "ipvs"} {
		write(path+".new", mode)
		restore := nstest.NoDescriptors(t)
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		wantUnread(t, changes, "too many open files")
		restore()
		wantMode(t, changes, mode)
	}
	end()
	restore := nstest.NoDescriptors(t)
	changes, end = watch(t, flags)
	defer end()
	wantUnread(t, changes, "too many open files")
	restore()
	wantMode(t, changes, "ipvs")
	write(path, "nftables")
	wantMode(t, changes, "nftables")
}

// TestKubeconfigIsWatched: a kubeconfig that changes makes another Config, with and without
// a configuration file, at the path that the file names then, and beside a file that
// changes all the time.
func TestKubeconfigIsWatched(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(path+".new", []byte(text), 0o600), os.Rename(path+".new", path)); err != nil {
			t.Fatal(err)
		}
	}
	file, first, second := filepath.Join(dir, "config.conf"), filepath.Join(dir, "kubeconfig"), filepath.Join(other, "kubeconfig")
	naming := func(kubeconfig string) string { return fileHead + "clientConnection: {kubeconfig: " + kubeconfig + "}" }
	write(first, "1")
	write(second, "2")
	write(file, naming(first))
	noise, quiet := context.WithCancel(t.Context())
	var noisy sync.WaitGroup
	noisy.Go(func() {
		for wait.For(noise, quietTime/5) {
			_ = os.WriteFile(filepath.Join(dir, "other"), []byte("noise"), 0o600)
		}
	})
	defer noisy.Wait()
	defer quiet()
	for _, test := range []struct {
		args  []string
		moves bool // the file then names the second kubeconfig
	}{
		{args: []string{"--kubeconfig=" + first, "--hostname-override=n"}},
		{args: []string{"--config=" + file, "--hostname-override=n"}, moves: true},
	} {
		flags, before := configured(t, test.args...)
		changes, end := watch(t, flags)
		differs := func(what string) {
			t.Helper()
			s := <-changes
			if s.err != nil || s.config.KubeconfigDigest == before.KubeconfigDigest {
				t.Fatalf("%q: %s: %+v", test.args, what, s)
			}
			before = s.config
		}
		write(first, "changed for "+test.args[0])
		differs("a changed kubeconfig")
		if test.moves {
			write(file, naming(second))
			differs("another kubeconfig")
			write(second, "changed")
			differs("a change of another kubeconfig")
		}
		end()
	}
}
