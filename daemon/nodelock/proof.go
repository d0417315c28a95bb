// SPDX-License-Identifier: Apache-2.0

package nodelock

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"signalbox/internal/namespace"
)

// This file asks the kernel whether another process may configure this network
// namespace. The credentials of a connection do not tell: they have no capabilities,
// and no process number of another container.
//
// The proof is a netlink socket that the other process opened. The kernel serves a
// request on such a socket only if the process that opened it had CAP_NET_ADMIN in the
// user namespace that owns the network namespace (netlink_net_capable).

var errNotPermitted = errors.New("the client has not proved CAP_NET_ADMIN in this network namespace")

// newProof opens the socket that proves what this process may do.
func newProof() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "proof"), nil
}

// checkProof returns nil if the process that opened the socket may configure this
// thread's network namespace.
func checkProof(proof *os.File) error {
	if proof == nil {
		return errNotPermitted
	}
	fd := int(proof.Fd())
	for option, want := range map[int]int{unix.SO_DOMAIN: unix.AF_NETLINK, unix.SO_PROTOCOL: unix.NETLINK_ROUTE} {
		if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option); err != nil || got != want {
			return errNotPermitted
		}
	}
	here, err := namespace.Current()
	if err != nil {
		return err
	}
	there, err := namespace.OfSocket(fd)
	if err != nil {
		return err
	}
	if there != here {
		return fmt.Errorf("the client is in another network namespace: %w", errNotPermitted)
	}
	return tryRequest(fd)
}

// tryRequest asks for a change of an interface that does not exist. The kernel answers
// at once: EPERM to a process that may not, ENODEV to one that may.
func tryRequest(fd int) error {
	// The other process can have answers of its own requests in the socket. It cannot
	// guess the number.
	var number [4]byte
	rand.Read(number[:])
	message := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	message.Seq = binary.NativeEndian.Uint32(number[:])
	noInterface := nl.NewIfInfomsg(unix.AF_UNSPEC)
	noInterface.Index = math.MaxInt32
	message.AddData(noInterface)
	request := message.Serialize()
	// With an address, the kernel would ask only what this process may do.
	if _, err := unix.Write(fd, request); err != nil {
		return fmt.Errorf("asking the kernel what the client may do: %w", err)
	}
	answer, err := readAnswer(fd, request)
	if err != nil {
		return fmt.Errorf("asking the kernel what the client may do: %w", err)
	}
	errno := unix.Errno(-int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])))
	if errno == unix.ENODEV {
		return nil
	}
	return fmt.Errorf("%w (%w)", errNotPermitted, errno)
}

// maxMessages bounds the messages before the kernel's answer. The other process can write
// faster than this one reads. Then the kernel drops its answer.
const maxMessages = 1000

// readAnswer returns the kernel's answer to a request. The kernel has sent it already.
func readAnswer(fd int, request []byte) ([]byte, error) {
	message := make([]byte, 4096)
	for range maxMessages {
		size, from, err := unix.Recvfrom(fd, message, unix.MSG_DONTWAIT)
		if err != nil {
			return nil, err
		}
		if a, ok := from.(*unix.SockaddrNetlink); ok && a.Pid == 0 && answers(message[:size], request) {
			return message[:size], nil
		}
	}
	return nil, fmt.Errorf("the client's socket has more than %d other messages", maxMessages)
}

// answers says whether a message is the kernel's answer to a request: an error code, and
// the header of the request (netlink(7)).
func answers(message, request []byte) bool {
	const code = unix.SizeofNlMsghdr
	return len(message) >= code+4+unix.SizeofNlMsghdr &&
		binary.NativeEndian.Uint16(message[4:]) == unix.NLMSG_ERROR &&
		string(message[code+4:code+4+unix.SizeofNlMsghdr]) == string(request[:unix.SizeofNlMsghdr])
}
