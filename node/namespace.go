// SPDX-License-Identifier: Apache-2.0

package node

import (
	"os"

	"github.com/vishvananda/netns"
)

const threadNamespace = "/proc/thread-self/ns/net"

// processNamespace is the network namespace in which the process started. It is
// read at the start because the main thread may change its namespace later.
var processNamespace, _ = os.Readlink(threadNamespace)

// ForeignNamespace returns the network namespace of the calling thread, or
// netns.None if it is the process's own: a socket is in that one on whichever thread
// it is opened, and entering it by name needs CAP_SYS_ADMIN, which a container does
// not have. The caller closes an open handle.
func ForeignNamespace() (netns.NsHandle, error) {
	here, err := os.Readlink(threadNamespace)
	if err != nil || here == processNamespace {
		return netns.None(), err
	}
	return netns.Get()
}
