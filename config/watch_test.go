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

	"github.com/spf13/pflag"

	"signalbox/internal/wait"
)

// seen is what Watch calls out.
type seen struct {
	config *Config
	err    error
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
	var flags Flags
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.Add(fs)
	if err := fs.Parse([]string{"--config=" + path, "--hostname-override=n"}); err != nil {
		t.Fatal(err)
	}
	if c, err := flags.Config(); err != nil || c.Mode != "iptables" {
		t.Fatalf("%+v, %v", c, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	changes, ended := make(chan seen, 100), make(chan struct{})
	go func() {
		defer close(ended)
		flags.Watch(ctx, slog.New(slog.NewTextHandler(t.Output(), nil)), func(c *Config, err error) { changes <- seen{c, err} })
	}()
	defer func() { cancel(); <-ended }()

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
		var flags Flags
		fs := pflag.NewFlagSet("", pflag.ContinueOnError)
		flags.Add(fs)
		if err := fs.Parse(test.args); err != nil {
			t.Fatal(err)
		}
		before, err := flags.Config()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		changes, ended := make(chan seen, 100), make(chan struct{})
		go func() {
			defer close(ended)
			flags.Watch(ctx, slog.New(slog.NewTextHandler(t.Output(), nil)), func(c *Config, err error) { changes <- seen{c, err} })
		}()
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
		cancel()
		<-ended
	}
}
