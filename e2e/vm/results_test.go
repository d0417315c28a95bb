// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestNextFollowsEnds wants a parallel test before one that began earlier and
// still runs, and the subtests of one that still runs.
func TestNextFollowsEnds(t *testing.T) {
	r := newResults()
	for _, e := range []testEvent{
		{Action: "run", Test: "A"}, {Action: "run", Test: "A/slow"}, {Action: "run", Test: "A/quick"},
		{Action: "pass", Test: "A/quick"},
	} {
		r.take(e)
	}
	a := r.next(r.root)
	if c := r.next(a); c.name != "quick" {
		t.Errorf("the first is %s", c.name)
	}
	r.take(testEvent{Action: "pass", Test: "A/slow"})
	r.take(testEvent{Action: "pass", Test: "A"})
	if c := r.next(a); c.name != "slow" {
		t.Errorf("the second is %s", c.name)
	}
	if c := r.next(a); c != nil {
		t.Errorf("there is a third, %s", c.name)
	}
}

const stream = `{"Action":"start"}
{"Action":"run","Test":"TestA"}
{"Action":"output","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"run","Test":"TestA/file/IPv4/x"}
{"Action":"run","Test":"TestA/file/IPv4/y"}
{"Action":"output","Test":"TestA/file/IPv4/x","Output":"    a_test.go:3: hi\n"}
{"Action":"output","Test":"TestA/file/IPv4/x","Output":"    --- FAIL: TestA/file/IPv4/x (0.25s)\n"}
{"Action":"run","Test":"TestA/file/IPv4/x/deep"}
{"Action":"pass","Test":"TestA/file/IPv4/x/deep","Elapsed":0.1}
{"Action":"fail","Test":"TestA/file/IPv4/x","Elapsed":0.25}
{"Action":"skip","Test":"TestA/file/IPv4/y"}
{"Action":"fail","Test":"TestA","Elapsed":1}
{"Action":"run","Test":"TestB"}
{"Action":"output","Output":"panic: x\n"}
`

func TestResults(t *testing.T) {
	r := newResults()
	if err := r.read(strings.NewReader(stream)); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	describe(&b, r, r.root, "")
	const want = `"": "" "panic: x\n"
 "TestA": "fail" ""
  "file/IPv4/x": "fail" "    a_test.go:3: hi\n"
   "deep": "pass" ""
  "file/IPv4/y": "skip" ""
 "TestB": "" ""
`
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
	if err := newResults().read(strings.NewReader(`{"Action":`)); err == nil {
		t.Error("a stream that is cut is accepted")
	}
}

// TestRunningTestsAreNamed wants the innermost of the tests that a machine's end
// cut, and none that waited for its turn.
func TestRunningTestsAreNamed(t *testing.T) {
	r := newResults()
	var streamed strings.Builder
	r.stream = &streamed
	const events = `{"Action":"run","Test":"TestA"}
{"Action":"run","Test":"TestA/x"}
{"Action":"output","Test":"TestA/x","Output":"=== RUN   TestA/x\n"}
{"Action":"output","Test":"TestA/x","Output":"=== PAUSE TestA/x\n"}
{"Action":"pause","Test":"TestA/x"}
{"Action":"run","Test":"TestA/y"}
{"Action":"pause","Test":"TestA/y"}
{"Action":"cont","Test":"TestA/y"}
{"Action":"output","Test":"TestA/y","Output":"    a_test.go:3: hi\n"}
{"Action":"run","Test":"TestA/z"}
{"Action":"pass","Test":"TestA/z"}
`
	if err := r.read(strings.NewReader(events)); err != nil {
		t.Fatal(err)
	}
	if got := r.cut(); !slices.Equal(got, []string{"TestA/y"}) {
		t.Errorf("cut: %q", got)
	}
	if want := "=== RUN   TestA/x\n    a_test.go:3: hi\n"; streamed.String() != want {
		t.Errorf("streamed %q", &streamed)
	}
}

func describe(b *strings.Builder, r *results, t *result, indent string) {
	action, output, _ := r.snapshot(t)
	b.WriteString(indent + strconv.Quote(t.name) + ": " + strconv.Quote(action) + " " + strconv.Quote(output) + "\n")
	for c := r.next(t); c != nil; c = r.next(t) {
		describe(b, r, c, indent+" ")
	}
}

func TestInside(t *testing.T) {
	for _, c := range []struct {
		pattern, want string
		none          bool
	}{
		{"", "", false},
		{"TestContract", "", false},
		{"^TestContract$", "", false},
		{"TestContract/TestNFTables", "TestNFTables", false},
		{"Test/A(b/c|d)/[/|]", "A(b/c|d)/[/|]", false},
		{"TestLab|TestContract/A/B|Contract/C", "A/B|C", false},
		{"TestContract/A|TestContract", "", false},
		{"TestLab/A", "", true},
		{`TestContract/a\/b`, `a\/b`, false},
	} {
		rest, none := inside(c.pattern, "TestContract")
		if rest != c.want || none != c.none {
			t.Errorf("%q: %q, %v; want %q, %v", c.pattern, rest, none, c.want, c.none)
		}
	}
}
