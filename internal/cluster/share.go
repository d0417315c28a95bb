// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Share runs a package's tests with one control plane for all of them, and ends
// the process: it is what a TestMain does. The cluster has a directory of its
// own, whatever opts says. before is called with the cluster at work, ahead of
// the tests.
func Share(m interface{ Run() int }, opts Options, before func(context.Context, *Cluster) error) {
	code, err := share(m, opts, before)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func share(m interface{ Run() int }, opts Options, before func(context.Context, *Cluster) error) (code int, err error) {
	ctx := context.Background()
	bin, err := Build(ctx, func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) })
	if err != nil {
		return 0, err
	}
	if opts.Dir, err = MakeDir(); err != nil {
		return 0, err
	}
	defer os.RemoveAll(opts.Dir)
	c, err := Start(ctx, bin, opts)
	if err != nil {
		return 0, err
	}
	defer func() {
		if stopErr := c.Stop(); err == nil {
			err = stopErr
		}
	}()
	if err := before(ctx, c); err != nil {
		return 0, err
	}
	return m.Run(), nil
}

// NeverCached keeps `go test` from reusing this result for the next run. It does not see
// that the program under test has changed, which a test builds or starts. It trusts no
// file that looks newer than its own clock. A test calls this, not a TestMain.
func NeverCached(ctx context.Context) error {
	_, cache, unlock, err := openCache(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	mark := filepath.Join(cache, "never-cached")
	if err := os.WriteFile(mark, nil, 0o644); err != nil {
		return err
	}
	future := time.Now().Add(24 * time.Hour)
	if err := os.Chtimes(mark, future, future); err != nil {
		return err
	}
	_, err = os.Stat(mark) // go test records the files that a test looks at
	return err
}
