// SPDX-License-Identifier: Apache-2.0

package netlab

import "sync/atomic"

// The source ports that FreshPort gives, a part of Linux' default ip_local_port_range.
const (
	firstFreshPort = 36000
	freshPorts     = 24000
)

var freshPortsGiven atomic.Uint32

// FreshPort is a source port for a new UDP flow. The last 24,000 calls have returned
// others. A port that the kernel chooses may be one of an earlier flow, by chance: the
// connection tracking table still sends it to the endpoint of that flow.
func FreshPort() uint16 {
	return firstFreshPort + uint16(freshPortsGiven.Add(1)%freshPorts)
}
