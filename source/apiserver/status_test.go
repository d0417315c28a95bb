// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

func TestFailuresAreLoggedOnceInAWhile(t *testing.T) {
	var lines logged
	now := time.Unix(0, 0)
	s := &requestStatus{resource: "services", log: slog.New(slog.NewTextHandler(&lines, nil)), now: func() time.Time { return now }}
	refused := fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
	steps := []struct {
		after time.Duration
		err   error
		lines int // in all
	}{
		{0, nil, 0},
		{0, refused, 1},
		{10 * time.Second, refused, 1},
		{0, apierrors.NewUnauthorized("no"), 2}, // another reason
		{30 * time.Second, apierrors.NewUnauthorized("no"), 2},
		{31 * time.Second, apierrors.NewUnauthorized("no"), 3}, // it lasts
		{0, apierrors.NewResourceExpired("old"), 3},            // no failure
		{0, nil, 4},
		{0, nil, 4},
		{0, refused, 5},
	}
	for i, step := range steps {
		now = now.Add(step.after)
		s.ended(context.Background(), "list", step.err)
		if got := lines.count("\n"); got != step.lines {
			t.Fatalf("step %d (%v): %d lines in the log, want %d:\n%s", i, step.err, got, step.lines, lines.b.String())
		}
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	s.ended(ended, "list", errors.New("cut off"))
	if got := lines.count("\n"); got != 5 {
		t.Errorf("the end of the process was logged as a failure:\n%s", lines.b.String())
	}
}

func TestMissingOptionalResourceIsLoggedOnce(t *testing.T) {
	var lines logged
	now := time.Unix(0, 0)
	s := &requestStatus{resource: "servicecidrs", optional: true, log: slog.New(slog.NewTextHandler(&lines, nil)), now: func() time.Time { return now }}
	for range 5 {
		s.ended(context.Background(), "list", apierrors.NewNotFound(schema.GroupResource{Resource: "servicecidrs"}, ""))
		now = now.Add(time.Hour)
	}
	if got := lines.count("no servicecidrs"); got != 1 {
		t.Errorf("logged %d times, want once:\n%s", got, lines.b.String())
	}
}

func TestExplain(t *testing.T) {
	slices := schema.GroupResource{Group: "discovery.k8s.io", Resource: "endpointslices"}
	for want, err := range map[string]error{
		"credentials":         apierrors.NewUnauthorized("no"),
		"system:node-proxier": apierrors.NewForbidden(slices, "", errors.New("no rule")),
		"overloaded":          apierrors.NewTooManyRequests("later", 1),
		"nothing listens":     fmt.Errorf("get: %w", syscall.ECONNREFUSED),
		"no route":            fmt.Errorf("get: %w", syscall.ENETUNREACH),
		"failed":              errors.New("anything else"),
	} {
		if got := explain("endpointslices", err); !strings.Contains(got, want) {
			t.Errorf("%v is explained as %q, want something about %q", err, got, want)
		}
	}
}
