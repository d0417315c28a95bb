package config

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// logLines hands over each line of a log.
type logLines chan string

func (l logLines) Write(b []byte) (int, error) {
	l <- string(b)
	return len(b), nil
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
	if c, err := flags.Config(); err != nil || c.Mode != ModeIPTables {
		t.Fatalf("%+v, %v", c, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	lines, changes, ended := make(logLines, 100), make(chan *Config, 100), make(chan struct{})
	go func() {
		defer close(ended)
		flags.Watch(ctx, slog.New(slog.NewTextHandler(lines, nil)), func(c *Config) { changes <- c })
	}()
	defer func() { cancel(); <-ended }()

	replace("mode: ipvs")
	if c := <-changes; c.Mode != ModeIPVS {
		t.Errorf("renamed into place: mode %s", c.Mode)
	}
	<-lines
	replace("mode: nftables")
	<-changes
	<-lines
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteString(fileHead + "mode: iptables"); err != nil { // as long as what was there
		t.Fatal(err)
	}
	if c := <-changes; c.Mode != ModeIPTables {
		t.Errorf("written in place: mode %s", c.Mode)
	}
	<-lines
	replace("mode: none")
	if line := <-lines; !strings.Contains(line, "mode: none: not one of") || !strings.Contains(line, path) {
		t.Errorf("a wrong file is logged as %q", line)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if line := <-lines; !strings.Contains(line, "no such file") {
		t.Errorf("a file that is gone is logged as %q", line)
	}
	replace("mode: nftables\nclusterCIDR: 10.0.0.0/8")
	if c := <-changes; len(c.Settings.ClusterCIDRs) != 1 {
		t.Errorf("written again: %+v", c.Settings)
	}
	if len(changes) > 0 {
		t.Errorf("%d more changes than there were", len(changes))
	}
}
