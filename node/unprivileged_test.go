// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"net/netip"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A container that may change the node's rules has CAP_NET_ADMIN and little
// else. Watch must not ask for more.
func TestWatchNeedsNoCapability(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan []netip.Addr, 1)
	ended := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends as it is
		if err := dropCapabilities(); err != nil {
			ended <- err
			return
		}
		ended <- Watch(ctx, func(a []netip.Addr) {
			select {
			case told <- a:
			default:
			}
		})
	}()
	select {
	case <-told:
		cancel()
	case err := <-ended:
		t.Fatalf("Watch without a capability = %v", err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Watch = %v, want nil once its context ends", err)
	}
}

// dropCapabilities takes the calling thread's rights away.
func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}
