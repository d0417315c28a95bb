package userspace

import (
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Connections that bear their client's address take a port between these,
// because the client may open a connection to the same endpoint itself, which
// would then be the same one to everybody who sees its packets. Clients' systems
// use 32768 and above by default (net.ipv4.ip_local_port_range; other systems
// 49152 and above), NodePorts are from 30000 on, and the relay's own ports lie
// below. The kernel's way to choose a range for one socket (IP_LOCAL_PORT_RANGE,
// Linux 6.3) knows only ports inside ip_local_port_range.
const (
	firstForeignPort = 11000
	lastForeignPort  = 29999
)

// foreignPortTries is how many ports are tried before the kernel may choose any.
const foreignPortTries = 8

// foreignPorts are the ports for connections that bear their client's address.
type foreignPorts []uint16

// newForeignPorts leaves out what the operator keeps for other programs
// (net.ipv4.ip_local_reserved_ports, which is for IPv6 too).
func newForeignPorts() foreignPorts {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
	if err != nil {
		slog.Warn("userspace: net.ipv4.ip_local_reserved_ports cannot be read and is not obeyed", "error", err)
	}
	return foreignPortsBut(string(text))
}

// foreignPortsBut leaves out ports in the notation of the sysctl: "80,100-120".
func foreignPortsBut(reserved string) foreignPorts {
	keep := map[int]bool{}
	for _, item := range strings.Split(strings.TrimSpace(reserved), ",") {
		low, high, isRange := strings.Cut(item, "-")
		if !isRange {
			high = low
		}
		first, err1 := strconv.Atoi(low)
		last, err2 := strconv.Atoi(high)
		if errors.Join(err1, err2) != nil {
			continue
		}
		for p := max(first, firstForeignPort); p <= min(last, lastForeignPort); p++ {
			keep[p] = true
		}
	}
	var list foreignPorts
	for p := firstForeignPort; p <= lastForeignPort; p++ {
		if !keep[p] {
			list = append(list, uint16(p))
		}
	}
	return list
}

// any is one of the ports, or 0, with which the kernel chooses, if there are
// none.
func (p foreignPorts) any() uint16 {
	if len(p) == 0 {
		return 0
	}
	return p[rand.IntN(len(p))]
}

// isPortTaken says whether it was for the choice of the port that there is no
// connection.
func isPortTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}
