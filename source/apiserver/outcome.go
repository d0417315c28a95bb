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
)

// repeatAfter is how often a failure that lasts is logged.
const repeatAfter = time.Minute

// errNoAnswer stands for the error that client-go withholds when a watch gets
// no answer.
var errNoAnswer = errors.New("the connection timed out or was closed before an answer came")

// outcome follows whether requests for one resource succeed, and logs when
// that changes. The lists and watches of a reflector come from one goroutine or
// another, hence the lock.
type outcome struct {
	resource string // as RBAC rules name it
	optional bool   // Services can be served without it
	log      *slog.Logger
	now      func() time.Time
	noted    func(resource string, err error) // may be nil; see Source

	mu     sync.Mutex
	since  time.Time // of the first failure in a row; zero: the last request succeeded
	said   string    // the failure logged last
	saidAt time.Time
}

// note is told how every request ended.
func (o *outcome) note(ctx context.Context, verb string, err error) {
	if ctx.Err() != nil {
		return
	}
	o.tell(err)
	o.mu.Lock()
	defer o.mu.Unlock()
	now := o.now()
	switch {
	case err == nil && o.since.IsZero():
		return
	case err == nil:
		o.log.Info("the API server answers again", "resource", o.resource, "after", now.Sub(o.since).Round(time.Millisecond))
		o.since, o.said = time.Time{}, ""
		return
	case isStale(err):
		o.log.Debug("the API server wants everything to be listed anew", "resource", o.resource, "error", err)
		return
	}
	if o.since.IsZero() {
		o.since = now
	}
	reason := explain(o.resource, err)
	// What the server refuses for good, and is not necessary, is said once.
	forGood := o.optional && (apierrors.IsNotFound(err) || apierrors.IsForbidden(err))
	if reason == o.said && (forGood || now.Sub(o.saidAt) < repeatAfter) {
		return
	}
	o.said, o.saidAt = reason, now
	if forGood {
		o.log.Warn("Services are served without what the API server does not offer", "resource", o.resource, "reason", reason, "error", err)
		return
	}
	o.log.Warn("asking the API server failed; what is known goes on being served, and it is asked again",
		"resource", o.resource, "request", verb, "reason", reason, "since", o.since.Format(time.RFC3339), "error", err)
}

// isStale tells whether the server is well and only wants to be asked anew.
func isStale(err error) bool {
	return apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || apierrors.IsTimeout(err)
}

func (o *outcome) tell(err error) {
	switch {
	case o.noted == nil || isStale(err):
	case o.optional && apierrors.IsNotFound(err):
		o.noted(o.resource, nil)
	default:
		o.noted(o.resource, err)
	}
}

// explain says in a few words what an operator should look at.
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
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nothing listens at its address; look at --master or the kubeconfig's server, and whether the API server runs"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "there is no route to its address"
	case errors.Is(err, errNoAnswer), errors.As(err, &network) && network.Timeout():
		return "no answer comes from its address; look for a packet filter on the way, and whether the API server hangs"
	}
	return "the request failed"
}
