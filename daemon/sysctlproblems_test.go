// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"signalbox/node"
)

// TestSettings checks that each kernel setting that is missing is told once, and
// for as long as anybody misses it.
func TestSettings(t *testing.T) {
	var log bytes.Buffer
	var told []string
	s := &sysctlProblems{
		log: slog.New(slog.NewTextHandler(&log, nil)), byOwner: map[string][]*node.KernelProblem{},
		report: func(name string, err error) { told = append(told, fmt.Sprint(name, " ", err != nil)) },
	}
	problem := func(name string) *node.KernelProblem {
		return &node.KernelProblem{File: "/proc/sys/" + name, Wanted: "1", Found: "0", Err: errors.New("no"), Impact: "it is dark"}
	}
	check := func(step string, logged int, wantTold, wantNames []string) {
		t.Helper()
		if n := strings.Count(log.String(), "\n"); n != logged || !slices.Equal(told, wantTold) || !slices.Equal(s.names(), wantNames) {
			t.Errorf("%s: told %v, not %v; names %v, not %v; %d lines in the log, not %d:\n%s", step, told, wantTold, s.names(), wantNames, n, logged, log.String())
		}
		log.Reset()
		told = nil
	}
	s.set("IPv4", nil)
	check("nothing is missing", 0, nil, nil)
	s.set("IPv4", []*node.KernelProblem{problem("b"), problem("a")})
	check("two are missing", 2, []string{"b true", "a true"}, []string{"a", "b"})
	s.set("IPv6", []*node.KernelProblem{problem("b")})
	check("one of them to the other family, too", 0, []string{"b true"}, []string{"a", "b"})
	s.set("IPv4", nil)
	check("to one family nothing is missing any more", 1, []string{"a false"}, []string{"b"})
	other := problem("b")
	other.Found = "2"
	s.set("IPv6", []*node.KernelProblem{other})
	check("it is missing in another way", 1, []string{"b true"}, []string{"b"})
	s.set("IPv6", nil)
	check("to the other, too", 1, []string{"b false"}, nil)
}
