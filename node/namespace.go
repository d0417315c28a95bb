package node

import (
	"os"

	"github.com/vishvananda/netns"
)

const threadNamespace = "/proc/thread-self/ns/net"

// processNamespace is the network namespace that the process began in. Read
// later, it would be wherever the main thread is by then.
var processNamespace, _ = os.Readlink(threadNamespace)

// ForeignNamespace returns the network namespace of the calling thread, or
// netns.None where that is the process's own: a socket that is opened on any
// thread is of that one, and to name it would cost CAP_SYS_ADMIN, which a
// container has not. The caller closes what is open.
func ForeignNamespace() (netns.NsHandle, error) {
	here, err := os.Readlink(threadNamespace)
	if err != nil || here == processNamespace {
		return netns.None(), err
	}
	return netns.Get()
}
