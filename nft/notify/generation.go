// SPDX-License-Identifier: Apache-2.0

package notify

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// generation is the number of a transaction of a network namespace. A notification also
// has the process that made it. An answer has the process that asked.
type generation struct {
	id, pid uint32
	process string
}

// generation asks for the number of the last transaction, by any software.
func (l *listener) generation() (id uint32, err error) {
	answers, err := l.asking.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   make([]byte, nfgenmsg),
	})
	var attributes *netlink.AttributeDecoder
	switch {
	case err != nil:
	case len(answers) != 1 || len(answers[0].Data) < nfgenmsg:
		err = errors.New("an unknown answer")
	default:
		attributes, err = netlink.NewAttributeDecoder(answers[0].Data[nfgenmsg:])
	}
	if err != nil {
		return 0, fmt.Errorf("count the transactions of nf_tables: %w", err)
	}
	return readGeneration(attributes).id, nil
}

// waitForNotifications returns when the kernel has notified of all transactions that
// generation has counted so far. The kernel counts a transaction before it notifies of it,
// and holds a lock until it has done both. Each batch waits for this lock. This batch is
// for another generation, so the kernel refuses it and changes nothing.
func (l *listener) waitForNotifications(counted uint32) error {
	attributes := netlink.NewAttributeEncoder()
	attributes.ByteOrder = binary.BigEndian
	attributes.Uint32(unix.NFNL_BATCH_GENID, counted+1<<31|1) // 0 would be any generation
	number, err := attributes.Encode()
	if err == nil {
		_, err = l.asking.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request},
			Data:   append([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}, number...),
		})
	}
	if errors.Is(err, unix.ERESTART) {
		return nil
	}
	return fmt.Errorf("wait for the notifications of nf_tables: %w", err)
}

func readGeneration(attributes *netlink.AttributeDecoder) (g generation) {
	attributes.ByteOrder = binary.BigEndian
	for attributes.Next() {
		switch attributes.Type() {
		case unix.NFTA_GEN_ID:
			g.id = attributes.Uint32()
		case unix.NFTA_GEN_PROC_PID:
			g.pid = attributes.Uint32()
		case unix.NFTA_GEN_PROC_NAME:
			g.process = attributes.String()
		}
	}
	return g
}
