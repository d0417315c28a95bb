// SPDX-License-Identifier: Apache-2.0

// Package wait pauses goroutines and wakes them.
package wait

import (
	"context"
	"time"
)

// For returns true after d, or false as soon as ctx ends.
func For(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// Closed says whether a channel that nothing is sent on has been closed; false
// for a nil channel.
func Closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Wake puts a token into a channel with room for one, unless it is there. Whoever reads
// the channel sees one token for all calls before.
func Wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
