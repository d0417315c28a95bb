// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestChanges: updates that do not concern cause no reading, a burst causes one, and so do a
// subscription that the kernel ends and a reading that fails.
func TestChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var read []time.Duration // times of the readings
		var subscriptions []chan<- int
		var failure error
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			Changes[int]{
				Subscribe: func(updates chan<- int, done <-chan struct{}) error {
					subscriptions = append(subscriptions, updates)
					number := len(subscriptions)
					go func() {
						if <-done; number > 1 { // the test ends the first
							close(updates)
						}
					}()
					return nil
				},
				Concerns: func(u int) bool { return u > 0 },
				Read: func() error {
					read = append(read, time.Since(began).Round(time.Second))
					defer func() { failure = nil }()
					return failure
				},
				Quiet: 10 * time.Millisecond,
			}.Follow(ctx)
		}()
		at := func(second int, do func(updates chan<- int)) {
			time.Sleep(time.Until(began.Add(time.Duration(second) * time.Second)))
			synctest.Wait()
			do(subscriptions[len(subscriptions)-1])
		}
		at(1, func(updates chan<- int) { updates <- 0 })
		at(2, func(updates chan<- int) {
			for range 1000 {
				updates <- 1
			}
		})
		at(4, func(updates chan<- int) { close(updates) }) // as after ENOBUFS
		at(6, func(updates chan<- int) { failure = errors.New("no answer"); updates <- 1 })
		at(8, func(chan<- int) { cancel() })
		<-done
		if want := []time.Duration{0, 2 * time.Second, 4 * time.Second, 6 * time.Second, 6 * time.Second}; !slices.Equal(read, want) {
			t.Errorf("read at %v, want %v", read, want)
		}
	})
}
