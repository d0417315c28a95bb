// SPDX-License-Identifier: Apache-2.0

package nodelock

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
)

// prover names the lock that TestProver asks for in a process of its own.
const prover = "SIGNALBOX_TEST_PROVER"

// Only a process that may configure this network namespace gets the lock.
func TestProof(t *testing.T) {
	rootWithout := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	}
	otherNetwork := *rootWithout
	otherNetwork.Cloneflags |= syscall.CLONE_NEWNET
	for name, c := range map[string]struct {
		as    *syscall.SysProcAttr
		word  string
		wants string // in the log; "" if the lock is granted
	}{
		"root":                             {nil, "proof", ""},
		"root without proof":               {nil, "none", "has not proved"},
		"root with a file":                 {nil, "file", "has not proved"},
		"root with two files":              {nil, "two", "has not proved"},
		"root of another user namespace":   {rootWithout, "proof", "operation not permitted"},
		"root of a namespace of its own":   {&otherNetwork, "proof", "another network namespace"},
		"root of another network, no user": {&syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}, "proof", "another network namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			path := t.TempDir() + "/socket" // abstract sockets belong to a network namespace
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			client := exec.Command(os.Args[0], "-test.run=^TestProver$", "-test.v")
			client.Env = append(os.Environ(), prover+"="+c.word+" "+path)
			client.SysProcAttr = c.as
			client.Stdout, client.Stderr = t.Output(), t.Output()
			if err := client.Start(); err != nil {
				t.Fatal(err)
			}
			defer client.Wait()
			conn, err := l.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			lock := locksFor(t)()
			lock.requestTimeout = time.Minute
			err = lock.readRequest(t.Context(), conn)
			if c.wants == "" && err != nil || c.wants != "" && (err == nil || !strings.Contains(err.Error(), c.wants)) {
				t.Errorf("the request: %v, want %q", err, c.wants)
			}
		})
	}
}

// TestProver is the client of TestProof.
func TestProver(t *testing.T) {
	word, path, ok := strings.Cut(os.Getenv(prover), " ")
	if !ok {
		t.Skip("this is the client of TestProof")
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	switch fd := int(null.Fd()); word {
	case "proof":
		err = sendRequest(c)
	case "none":
		err = send(c, wordAcquire)
	case "file":
		_, _, err = c.WriteMsgUnix([]byte(wordAcquire), unix.UnixRights(fd), nil)
	case "two":
		_, _, err = c.WriteMsgUnix([]byte(wordAcquire), unix.UnixRights(fd, fd), nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	waitForEnd(t.Context(), c)
}

// The answer to an earlier request of the other process is not taken for the kernel's.
func TestProofWithOldAnswer(t *testing.T) {
	nstest.Enter(t)
	proof := proofOf(t)
	if err := errors.Join(checkProof(proof), checkProof(proof)); err != nil {
		t.Fatal(err)
	}
	fillProof(t, proof, 1)
	if err := checkProof(proof); err != nil {
		t.Error(err)
	}
}

// The check ends also if the client's socket always has another message.
func TestProofWithFullSocket(t *testing.T) {
	nstest.Enter(t)
	proof := proofOf(t)
	if err := unix.SetsockoptInt(int(proof.Fd()), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
		t.Fatal(err)
	}
	fillProof(t, proof, 4*maxMessages)
	if err := checkProof(proof); err == nil || !strings.Contains(err.Error(), "other messages") {
		t.Errorf("the check: %v", err)
	}
}

func proofOf(t *testing.T) *os.File {
	t.Helper()
	proof, err := newProof()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proof.Close() })
	return proof
}

// fillProof has the kernel answer n requests of the process that made the proof.
func fillProof(t *testing.T, proof *os.File, n int) {
	t.Helper()
	requests := make([]byte, n*unix.SizeofNlMsghdr)
	for r := requests; len(r) > 0; r = r[unix.SizeofNlMsghdr:] {
		r[0], r[4], r[6] = unix.SizeofNlMsghdr, unix.NLMSG_NOOP, unix.NLM_F_REQUEST|unix.NLM_F_ACK
	}
	if err := unix.Sendto(int(proof.Fd()), requests, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
}
