// Package wait pauses a goroutine.
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
