// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// repeatAfter is the least time between two log lines about the same failure.
const repeatAfter = time.Minute

// errNoAnswer is for a watch that gets no answer: client-go withholds the error.
var errNoAnswer = errors.New("the connection timed out or was closed before an answer came")

// requestStatus follows whether requests for one resource succeed, and logs the
// changes. Requests of a reflector can end on two goroutines, hence the lock.
type requestStatus struct {
	resource  string // as RBAC rules name it
	optional  bool   // Services can be served without it
	log       *slog.Logger
	now       func() time.Time
	onRequest func(resource string, err error) // may be nil; see Source

	mu       sync.Mutex
	since    time.Time // of the first failure in a row; zero if the last request succeeded
	logged   string    // reason of the failure that was logged last
	loggedAt time.Time
}

// ended records the end of a request.
func (s *requestStatus) ended(ctx context.Context, verb string, err error) {
	if ctx.Err() != nil {
		return
	}
	if isStale(err) {
		s.log.Debug("the API server asks for a new list", "resource", s.resource, "error", err)
		return
	}
	if s.onRequest != nil {
		if s.optional && apierrors.IsNotFound(err) {
			s.onRequest(s.resource, nil)
		} else {
			s.onRequest(s.resource, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if err == nil {
		if !s.since.IsZero() {
			s.log.Info("the API server answers again", "resource", s.resource, "after", now.Sub(s.since).Round(time.Millisecond))
		}
		s.since, s.logged = time.Time{}, ""
		return
	}
	if s.since.IsZero() {
		s.since = now
	}
	reason := explain(s.resource, err)
	// A permanent failure of an optional resource is logged once.
	permanent := s.optional && (apierrors.IsNotFound(err) || apierrors.IsForbidden(err))
	if reason == s.logged && (permanent || now.Sub(s.loggedAt) < repeatAfter) {
		return
	}
	s.logged, s.loggedAt = reason, now
	if permanent {
		s.log.Warn("the API server does not offer an optional resource; Services are served without it", "resource", s.resource, "reason", reason, "error", err)
		return
	}
	s.log.Warn("a request to the API server failed; known Services stay served, and signalbox tries again",
		"resource", s.resource, "request", verb, "reason", reason, "since", s.since.Format(time.RFC3339), "error", err)
}

// isStale says whether the server works, and only lacks the resource version: it is too
// old, or newer than the server's data. Any other 504 means that the server cannot read
// its data, or that a load balancer cannot reach the server.
func isStale(err error) bool {
	return apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge)
}

// explain says what an operator should look at.
func explain(resource string, err error) string {
	var network net.Error
	switch {
	case apierrors.IsUnauthorized(err):
		return "the credentials are not accepted"
	case apierrors.IsForbidden(err):
		return fmt.Sprintf("the account may not list and watch %s; the ClusterRole system:node-proxier allows it", resource)
	case apierrors.IsNotFound(err):
		return "this server has no " + resource
	case apierrors.IsTooManyRequests(err), apierrors.IsServiceUnavailable(err):
		return "the server is overloaded or starting"
	case apierrors.IsTimeout(err):
		return "the server gets no answer from etcd, or a load balancer gets none from the server"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nothing listens at its address; look at --master or the kubeconfig's server, and whether the API server runs"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "there is no route to its address"
	case errors.Is(err, errNoAnswer), errors.As(err, &network) && network.Timeout():
		return "no answer comes from its address; look for a packet filter on the way, and whether the API server hangs"
	}
	return "the request failed"
}
