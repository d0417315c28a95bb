// SPDX-License-Identifier: Apache-2.0

package nodelock

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/rootonly"
)

// This file has what two processes say to each other.

const (
	wordAcquire    = "take\n"       // from the contender, with its proof: it serves, hand over
	wordReleased   = "given\n"      // from the holder: it writes no more
	wordConditions = "conditions\n" // from signalbox ready; the answer has a line for each
)

var errAnswered = errors.New("the client asked for the conditions only")

// requestHandover asks the holder for the lock. The connection stays open as long as
// this process lives: its end tells the other process.
func requestHandover(ctx context.Context, address string) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", address)
	if err != nil {
		return nil, err
	}
	c := conn.(*net.UnixConn)
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	defer endWith(ctx, c.SetDeadline)()
	if err = rootonly.CheckPeer(c); err == nil {
		err = sendRequest(c)
	}
	if err == nil {
		err = receive(c, wordReleased)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// sendRequest sends the proof with the word.
func sendRequest(c *net.UnixConn) error {
	proof, err := newProof()
	if err != nil {
		return err
	}
	defer proof.Close()
	_, _, err = c.WriteMsgUnix([]byte(wordAcquire), unix.UnixRights(int(proof.Fd())), nil)
	return err
}

// readRequest returns nil if the client requests the lock and may have it. It waits for
// the request no longer than requestTimeout, nor than ctx.
func (n *Lock) readRequest(ctx context.Context, c *net.UnixConn) error {
	// Anybody can connect to the abstract socket.
	if err := rootonly.CheckPeer(c); err != nil {
		return err
	}
	c.SetDeadline(time.Now().Add(n.requestTimeout))
	release := endWith(ctx, c.SetReadDeadline)
	word, proof, err := readRequestWord(c)
	release()
	if proof != nil {
		defer proof.Close()
	}
	switch {
	case err != nil:
		return err
	case word == wordConditions:
		return cmp.Or(n.sendConditions(c), errAnswered)
	}
	if err := expect(word, wordAcquire); err != nil {
		return err
	}
	return checkProof(proof)
}

// readRequestWord returns a client's first word, and the descriptor that came with it; nil
// without one.
func readRequestWord(c *net.UnixConn) (word string, proof *os.File, err error) {
	text, control := make([]byte, 16), make([]byte, unix.CmsgSpace(4))
	size, controlSize, _, _, err := c.ReadMsgUnix(text, control)
	if err != nil {
		return "", nil, err
	}
	if size == 0 {
		return "", nil, io.EOF
	}
	for _, fd := range receivedDescriptors(control[:controlSize]) {
		if proof == nil {
			proof = os.NewFile(uintptr(fd), "proof")
		} else {
			unix.Close(fd)
		}
	}
	return string(text[:size]), proof, nil
}

func receivedDescriptors(control []byte) (fds []int) {
	messages, _ := unix.ParseSocketControlMessage(control) // what it cannot read has none
	for _, m := range messages {
		some, _ := unix.ParseUnixRights(&m)
		fds = append(fds, some...)
	}
	return fds
}

// sendConditions writes the conditions, one line each.
func (n *Lock) sendConditions(c *net.UnixConn) error {
	for _, text := range n.conditions() {
		if err := send(c, strings.ReplaceAll(text, "\n", " ")+"\n"); err != nil {
			return err
		}
	}
	return nil
}

func send(c *net.UnixConn, word string) error {
	_, err := c.Write([]byte(word))
	return err
}

func receive(c *net.UnixConn, want string) error {
	word, err := bufio.NewReaderSize(c, 16).ReadString('\n')
	if err != nil {
		return err
	}
	return expect(word, want)
}

func expect(word, want string) error {
	if word != want {
		return fmt.Errorf("the other process sent %q, not %q", word, want)
	}
	return nil
}
