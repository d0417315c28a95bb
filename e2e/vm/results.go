// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// results are those of a test binary, as they come in: a tree of tests that
// other goroutines can follow while it grows.
type results struct {
	mu      sync.Mutex
	changed *sync.Cond // over mu
	root    *result
	byName  map[string]*result // full name -> test
	// stream gets the lines of `go test -v` as they come; nil for nobody.
	stream io.Writer
}

// result is one test inside the machine; all fields are guarded by results.mu.
type result struct {
	name     string // below its parent
	children []*result
	output   strings.Builder
	action   string // "pass", "fail" or "skip" once the test has ended
	elapsed  time.Duration
	ended    bool // nothing will follow, whether or not there is an action
	paused   bool // waits for its turn among parallel tests
	shown    bool // next has returned it
}

func newResults() *results {
	r := &results{root: &result{}, byName: map[string]*result{}}
	r.changed = sync.NewCond(&r.mu)
	return r
}

// testEvent is a line that `go tool test2json` writes.
type testEvent struct {
	Action  string
	Test    string
	Output  string
	Elapsed float64 // seconds
}

// read takes events until their end, and then ends every test that they left
// open.
func (r *results) read(events io.Reader) error {
	defer r.end()
	d := json.NewDecoder(events)
	for {
		var e testEvent
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("results of test2json: %w", err)
		}
		r.take(e)
	}
}

func (r *results) take(e testEvent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.root
	if e.Test != "" {
		t = r.test(e.Test)
	}
	switch e.Action {
	case "output":
		if !isFrame(e.Output) {
			t.output.WriteString(e.Output)
		}
		r.show(e.Output)
	case "pause", "cont":
		t.paused = e.Action == "pause"
	case "pass", "fail", "skip":
		t.action, t.ended = e.Action, true
		t.elapsed = time.Duration(e.Elapsed * float64(time.Second))
	}
	r.changed.Broadcast()
}

// show streams a line, without those by which the testing package says whose
// the next lines are. An error to write costs a line on the screen.
func (r *results) show(line string) {
	if r.stream != nil && !strings.HasPrefix(line, "=== PAUSE") && !strings.HasPrefix(line, "=== CONT") && !strings.HasPrefix(line, "=== NAME") {
		_, _ = io.WriteString(r.stream, line)
	}
}

// isFrame tells whether a line is the testing package's own, which says what
// the structure says already.
func isFrame(line string) bool {
	line = strings.TrimLeft(line, " ")
	if line == "PASS\n" || line == "FAIL\n" {
		return true
	}
	for _, prefix := range []string{"=== ", "--- PASS: ", "--- FAIL: ", "--- SKIP: "} {
		if strings.HasPrefix(line, prefix) {
			return true
		}
	}
	return false
}

// test finds a test by its full name, or adds it below the test whose name is
// the longest beginning of its own: names can hold slashes of their own.
func (r *results) test(name string) *result {
	if t := r.byName[name]; t != nil {
		return t
	}
	parent, rest := r.root, name
	for i := len(name) - 1; i > 0; i-- {
		if p := r.byName[name[:i]]; name[i] == '/' && p != nil {
			parent, rest = p, name[i+1:]
			break
		}
	}
	t := &result{name: rest}
	r.byName[name] = t
	parent.children = append(parent.children, t)
	return t
}

func (r *results) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.root.ended = true
	for _, t := range r.byName {
		t.ended = true
	}
	r.changed.Broadcast()
}

// cut returns the names of the tests that were at work when the results ended,
// without those whose subtests were, and without those that waited.
func (r *results) cut() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var names []string
	for name, t := range r.byName {
		if t.action == "" && !t.paused && !slices.ContainsFunc(t.children, (*result).isOpen) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (t *result) isOpen() bool { return t.action == "" }

// next waits for a subtest of t that has something to show, an end or subtests
// of its own, and returns each once; nil when there will be none. Parallel
// tests come in the order in which they end.
func (r *results) next(t *result) *result {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		for _, c := range t.children {
			if !c.shown && (c.ended || len(c.children) > 0 || t.ended) {
				c.shown = true
				return c
			}
		}
		if t.ended {
			return nil
		}
		r.changed.Wait()
	}
}

// snapshot is what is known of a test that has ended.
func (r *results) snapshot(t *result) (action, output string, elapsed time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return t.action, t.output.String(), t.elapsed
}

// mirror makes the tests below t subtests of a test, which ends like t.
func (r *results) mirror(outer *testing.T, t *result) {
	for c := r.next(t); c != nil; c = r.next(t) {
		outer.Run(c.name, func(inner *testing.T) { r.mirror(inner, c) })
	}
	action, output, elapsed := r.snapshot(t)
	if output = strings.TrimRight(output, "\n"); output != "" && (r.stream == nil || action == "fail") {
		outer.Logf("in the machine, after %v:\n%s", elapsed, output)
	}
	switch action {
	case "pass":
	case "fail":
		outer.Fail()
	case "skip":
		outer.SkipNow()
	default:
		outer.Error("this test did not end in the machine")
	}
}
