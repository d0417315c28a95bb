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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

func TestFailuresAreLoggedOnceInAWhile(t *testing.T) {
	var lines logged
	now := time.Unix(0, 0)
	var failing error // as onRequest was last told
	s := &requestStatus{
		resource: "services", log: slog.New(slog.NewTextHandler(&lines, nil)), now: func() time.Time { return now },
		onRequest: func(_ string, err error) { failing = err },
	}
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
		{0, tooNew(), 3}, // nor is this
		{0, apierrors.NewTimeoutError("etcd is frozen", 0), 4},
		{0, nil, 5},
		{0, nil, 5},
		{0, refused, 6},
	}
	for i, step := range steps {
		now = now.Add(step.after)
		s.ended(context.Background(), "list", step.err)
		if got := lines.count("\n"); got != step.lines {
			t.Fatalf("step %d (%v): %d lines in the log, want %d:\n%s", i, step.err, got, step.lines, lines.b.String())
		}
		if !isStale(step.err) && failing != step.err {
			t.Errorf("step %d: %v is reported as %v", i, step.err, failing)
		}
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	s.ended(ended, "list", errors.New("cut off"))
	if got := lines.count("\n"); got != 6 {
		t.Errorf("the end of the process was logged as a failure:\n%s", lines.b.String())
	}
}

// tooNew is the answer of a server that has no resource version so new.
func tooNew() error {
	err := apierrors.NewTimeoutError("Too large resource version: 9, current: 8", 1)
	err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: metav1.CauseTypeResourceVersionTooLarge, Message: "Too large resource version"}}
	return err
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
		"from etcd":           apierrors.NewGenericServerResponse(504, "get", slices, "", "<html>504 Gateway Time-out</html>", 0, true),
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
