// SPDX-License-Identifier: Apache-2.0

package nfttest

import (
	"encoding/binary"
	"io"
	"sync"
	"syscall"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

// Kernel is an nf_tables in memory. The zero value has no tables. Several connections may
// use it at the same time.
type Kernel struct {
	// Refuse, if not nil, sees each message before the kernel acts. An errno other than 0
	// refuses the message, and with it the whole transaction. n counts the messages of a
	// transaction from 0; it is 0 for a listing. kind is a number such as
	// unix.NFT_MSG_NEWSETELEM. Refuse may change the kernel through another connection.
	Refuse func(n, kind int) syscall.Errno

	mu         sync.Mutex
	ruleset    ruleset
	generation uint32
	loss       loss
}

// loss says what becomes of the next transaction.
type loss uint8

const (
	answered loss = iota
	lostBefore
	lostAfter
)

// Connection makes nft.Open, or nftables.New, connect to this kernel.
func (k *Kernel) Connection() nftables.ConnOption { return nftables.WithTestDial(k.serve) }

// LoseAnswer has the answer to the next transaction go missing, as when the socket's buffer
// overflows. done says whether the kernel performs the transaction.
func (k *Kernel) LoseAnswer(done bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.loss = lostBefore
	if done {
		k.loss = lostAfter
	}
}

// Generation is the number of transactions that changed something.
func (k *Kernel) Generation() uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.generation
}

// serve is an nltest.Func. io.EOF says that there is nothing to receive.
func (k *Kernel) serve(requests []netlink.Message) ([]netlink.Message, error) {
	if len(requests) == 0 {
		return nil, io.EOF
	}
	isTransaction := requests[0].Header.Type == unix.NFNL_MSG_BATCH_BEGIN
	if isTransaction {
		requests = requests[1 : len(requests)-1]
	}
	// Refuse may use the kernel, so it runs before the lock.
	refused := make([]syscall.Errno, len(requests))
	for i, m := range requests {
		if k.Refuse != nil {
			refused[i] = k.Refuse(i, kindOf(m))
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if isTransaction {
		return k.transact(requests, refused)
	}
	found, errno := k.ruleset.list(requests[0])
	if kindOf(requests[0]) == unix.NFT_MSG_GETGEN {
		generation := netlink.Attribute{Type: unix.NFTA_GEN_ID, Data: binary.BigEndian.AppendUint32(nil, k.generation)}
		found, errno = [][]byte{encode(requests[0].Data, generation)}, 0
	}
	if refused[0] != 0 {
		errno = refused[0]
	}
	if errno != 0 {
		return refusal(requests[0], errno)
	}
	return answer(requests[0], found), nil
}

// transact performs a transaction on a copy, which replaces the ruleset on success.
func (k *Kernel) transact(requests []netlink.Message, refused []syscall.Errno) ([]netlink.Message, error) {
	fate := k.loss
	k.loss = answered
	if fate == lostBefore {
		return nil, unix.ENOBUFS
	}
	t := transaction{ruleset: k.ruleset.clone()}
	answer, err := []netlink.Message(nil), io.EOF
	for i, m := range requests {
		errno := refused[i]
		if errno == 0 {
			errno = t.apply(m)
		}
		if errno != 0 {
			answer, err = refusal(m, errno)
			break
		}
	}
	if answer == nil {
		k.ruleset = t.ruleset
		if t.changed {
			k.generation++
		}
	}
	if fate == lostAfter {
		return nil, unix.ENOBUFS
	}
	return answer, err
}

func refusal(m netlink.Message, errno syscall.Errno) ([]netlink.Message, error) {
	m.Header.Flags = 0
	return nltest.Error(int(errno), []netlink.Message{m})
}
