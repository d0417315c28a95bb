// SPDX-License-Identifier: Apache-2.0

package notify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"signalbox/internal/namespace"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// listener is the socket for notifications in one network namespace.
type listener struct {
	id     namespace.ID
	conn   *netlink.Conn
	asking *netlink.Conn // for generation
	closed atomic.Bool
	done   chan struct{} // closed when run returns
	muting sync.Mutex    // held by Mute

	mu            sync.Mutex // guards subscriptions
	subscriptions map[*Subscription]struct{}
}

// listeners has the listeners in use.
var listeners = struct {
	sync.Mutex
	byNamespace map[namespace.ID]*listener
}{byNamespace: map[namespace.ID]*listener{}}

func listen(id namespace.ID) (*listener, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	asking, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		conn.Close()
		return nil, err
	}
	l := &listener{id: id, conn: conn, asking: asking, done: make(chan struct{}), subscriptions: map[*Subscription]struct{}{}}
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		conn.Close()
		asking.Close()
		return nil, fmt.Errorf("join the group of nf_tables: %w", err)
	}
	go l.run()
	return l, nil
}

func (l *listener) add(s *Subscription) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.subscriptions[s] = struct{}{}
	return l.filter()
}

// remove closes the socket with its last subscription. The lock of listeners is held.
func (l *listener) remove(s *Subscription) {
	l.mu.Lock()
	delete(l.subscriptions, s)
	left := len(l.subscriptions)
	l.mu.Unlock()
	if left > 0 {
		return // the filter may drop one port too many
	}
	if listeners.byNamespace[l.id] == l {
		delete(listeners.byNamespace, l.id)
	}
	l.closed.Store(true)
	l.conn.Close()
	l.asking.Close()
	<-l.done
}

// senderOffset is the place of nlmsg_pid in struct nlmsghdr. In a notification it is the
// port that sent the transaction. All messages of one datagram have the same.
const senderOffset = 12

// filter has the kernel drop the notifications of the own transactions. So they cost no
// time, and do not fill the socket's buffer.
func (l *listener) filter() error {
	program := []bpf.Instruction{bpf.LoadAbsolute{Off: senderOffset, Size: 4}}
	for s := range l.subscriptions {
		if s.writer == NoWriter {
			continue
		}
		port := binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, s.writer))
		program = append(program,
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: port, SkipTrue: 1},
			bpf.RetConstant{Val: 0})
	}
	raw, err := bpf.Assemble(append(program, bpf.RetConstant{Val: 1 << 31}))
	if err != nil {
		return fmt.Errorf("assemble the filter: %w", err)
	}
	if err := l.conn.SetBPF(raw); err != nil {
		return fmt.Errorf("set the filter: %w", err)
	}
	return nil
}

// run reads notifications until the socket is closed.
func (l *listener) run() {
	defer close(l.done)
	for {
		messages, err := l.conn.Receive()
		if l.closed.Load() {
			return
		}
		if err != nil {
			l.lose()
			if !errors.Is(err, unix.ENOBUFS) {
				time.Sleep(time.Second) // it may not go away
			}
		}
		for _, m := range messages {
			l.handle(m)
		}
	}
}

// nfgenmsg is the length of struct nfgenmsg. Its first byte is the table's family.
const nfgenmsg = 4

// tableAttribute is the number of the attribute with the table's name. It is the same in
// the messages of all objects.
const tableAttribute = unix.NFTA_TABLE_NAME

func (l *listener) handle(m netlink.Message) {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < nfgenmsg {
		return
	}
	attributes, err := netlink.NewAttributeDecoder(m.Data[nfgenmsg:])
	if err != nil {
		return
	}
	kind := m.Header.Type & 0xff
	if kind == unix.NFT_MSG_NEWGEN {
		l.commit(readGeneration(attributes))
		return
	}
	for attributes.Next() {
		if attributes.Type() == tableAttribute {
			isElement := kind == unix.NFT_MSG_NEWSETELEM || kind == unix.NFT_MSG_DELSETELEM
			l.touch(m.Data[0], attributes.String(), !isElement)
			return
		}
	}
}

func (l *listener) touch(family byte, table string, rules bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for s := range l.subscriptions {
		if s.family == family && slices.Contains(s.tables, table) {
			s.touch(rules)
		}
	}
}

func (l *listener) commit(g generation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for s := range l.subscriptions {
		s.commit(g)
	}
}

func (l *listener) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for s := range l.subscriptions {
		s.lose()
	}
}
