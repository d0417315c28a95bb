package userspace

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Transparent connections take a source port between these, because the client may
// itself be connected to the same endpoint: from the same port the two would be one
// connection to everybody who sees the packets, and the relay's packets could end the
// client's. Clients use 32768 and above by default (net.ipv4.ip_local_port_range;
// other systems 49152 and above), NodePorts begin at 30000, and the relay's own ports
// lie below. IP_LOCAL_PORT_RANGE (Linux 6.3) allows only ports inside of
// ip_local_port_range.
const (
	firstSourcePort = 11000
	lastSourcePort  = 29999
)

// sourcePortTries is how many ports are tried before the kernel may choose any.
const sourcePortTries = 8

// sourcePorts are the ports to choose from.
type sourcePorts []uint16

// readSourcePorts leaves out net.ipv4.ip_local_reserved_ports, which is for IPv6 too.
func readSourcePorts() sourcePorts {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
	if err != nil {
		slog.Warn("userspace: net.ipv4.ip_local_reserved_ports cannot be read; connections to endpoints may take reserved ports", "error", err)
	}
	return sourcePortsWithout(string(text))
}

// sourcePortsWithout takes reserved ports in the notation of the sysctl: "80,100-120".
func sourcePortsWithout(reserved string) sourcePorts {
	isReserved := [1 << 16]bool{}
	for item := range strings.SplitSeq(reserved, ",") {
		var first, last uint16
		if n, _ := fmt.Sscanf(item, "%d-%d", &first, &last); n == 1 {
			last = first
		}
		for p := int(first); p <= int(last); p++ {
			isReserved[p] = true
		}
	}
	var list sourcePorts
	for p := uint16(firstSourcePort); p <= lastSourcePort; p++ {
		if !isReserved[p] {
			list = append(list, p)
		}
	}
	return list
}

// any is one of the ports, or 0, with which the kernel chooses, if there are none.
func (p sourcePorts) any() uint16 {
	if len(p) == 0 {
		return 0
	}
	return p[rand.IntN(len(p))]
}

// isPortTaken says whether a connection failed because of its source port.
func isPortTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}
